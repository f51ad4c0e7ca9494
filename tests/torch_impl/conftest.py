"""What the tests of `torch_impl` share: one thread, and pools of ranks that stay up for the session."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ranks import their work by module name

from ranks import Pools


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
