"""The start of SmolLM2 is bounded in memory; `dora-parity bench` times it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity.models.pretrained import PretrainedUnavailable, locate

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2-135M."""
    try:
        return locate(None)
    except PretrainedUnavailable as reason:
        pytest.skip(str(reason))


def measured(model: Path) -> dict[str, float]:
    """In a process of its own, since memory's peak is a process's."""
    command = [sys.executable, str(Path(__file__).with_name("start_costs.py")), str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own command
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_nf4_never_holds_a_second_model(model: Path) -> None:
    """The peak stays under 1.5 times the quantised model plus its largest tensor."""
    found = measured(model)

    assert found["model"] / 2 < found["over"] < 1.5 * found["model"] + found["largest"]
