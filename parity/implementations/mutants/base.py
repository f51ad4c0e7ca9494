"""A mutant is `torch_impl` with something replaced while a case runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from parity.case import UNSHARDED, Case
from parity.implementations.torch_dora import TorchDora
from parity.job import Place
from parity.shard import Shard


class Mutant(TorchDora):
    """Subclass me: `planted` replaces something and puts it back."""

    def planted(self, case: Case, place: Place) -> AbstractContextManager[object]:
        """Within this context the bug is there."""
        raise NotImplementedError

    def run(self, case: Case, place: Place) -> Iterator[Shard]:
        """As `torch_impl`, with the bug."""
        with self.planted(case, place):
            yield from super().run(case, place)

    def meet(self, case: Case, *, bad: bool) -> None:
        """As `torch_impl`, with the bug."""
        with self.planted(case, Place(0, 1, "cpu", None)):
            super().meet(case, bad=bad)


def is_sharded(case: Case) -> bool:
    """Whether the case shards at all: a bug of sharding leaves the unsharded twin alone."""
    return case.strategy != UNSHARDED and case.world > 1
