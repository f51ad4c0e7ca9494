"""What the tests of `torch_impl` share: one thread, pools of ranks that stay up for the session, a short run."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ranks import their work by module name

from ranks import Pools
from small import write_model, write_text


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Bitwise claims hold at one thread count."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Process groups by world size, started on first use."""
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and text."""
    folder = tmp_path_factory.mktemp("source")
    write_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def options(source: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Options of a short run in a folder of its own."""

    def make(name: str = "out", **changed: Any) -> dict[str, Any]:
        return {
            "model": source / "model", "data": source / "text.txt", "out": tmp_path / name, "steps": 3,
            "batch_size": 2, "seq_len": 24, "lr": 1e-2, "rank": 3, "clip_norm": 0.0, "packing": False,
        } | changed  # fmt: skip

    return make
