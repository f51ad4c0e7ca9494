"""The start of SmolLM2 is bounded: its memory, what magnitudes add to it, and peft's own way beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity.pretrained import PretrainedUnavailable, locate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2-135M."""
    try:
        return locate(None)
    except PretrainedUnavailable as reason:
        pytest.skip(str(reason))


def measured(what: str, model: Path) -> dict[str, float]:
    """In a process of its own, since memory's peak is a process's."""
    command = [sys.executable, str(Path(__file__).with_name("start_costs.py")), what, str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own command
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_nf4_never_holds_a_second_model(model: Path) -> None:
    """The peak stays under 1.5 times the quantised model plus its largest tensor."""
    found = measured("memory", model)

    assert found["over"] < 1.5 * found["model"] + found["largest"]


def test_preparing_qdora_takes_little_more_than_qlora_and_a_third_of_pefts(model: Path) -> None:
    """At most 1.5 times QLoRA with the same code, and a third of what peft takes to add DoRA to an NF4 model."""
    found = measured("times", model)

    assert found["qdora"] <= 1.5 * found["qlora"]
    assert 3 * found["add_ours"] <= found["add_peft"]
