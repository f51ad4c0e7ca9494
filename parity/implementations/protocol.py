"""What the pipeline asks of an implementation: a third party writes this form, or subclasses `TorchStack`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from parity.case import Case
from parity.job import Place
from parity.shard import Shard


class Implementation(Protocol):
    """It never sees an expected value: it gets a case, builds its inputs, and gives its shards."""

    def refuses(self, case: Case) -> str | None:
        """Why this case is not for it (the case is then skipped, and counted), or None."""
        ...

    def run(self, case: Case, place: Place) -> Iterator[Shard]:
        """Run the case on this rank and give what this rank holds, at every step."""
        ...
