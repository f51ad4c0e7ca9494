"""What the pipeline asks of an implementation: a third party writes this form, or subclasses `TorchStack`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from parity.case import Case, RefuseCase
from parity.job import Place
from parity.shard import Shard


class Implementation(Protocol):
    """It never sees an expected value: it gets a case, builds its inputs, and gives its shards."""

    units: str
    """`layer` where its units are S7's, so that the reference can predict what each rank holds; else empty."""
    gives: tuple[str, ...]
    """The kinds that it can be asked for beside gradients, parameters and the optimizer's state: `output`,
    `input_gradient`, `loss`, `norm`, `ratio`, and `base` for frozen weights under the reference's names."""

    def refuses(self, case: Case) -> str | None:
        """Why this case is not for it (the case is then skipped, and counted), or None.

        Every kind of case is asked about: ask for `case.task` before the fields that one kind alone has.
        """
        ...

    def run(self, case: Case, place: Place) -> Iterator[Shard]:
        """Run the case on this rank and give what this rank holds, at every step."""
        ...

    def meet(self, case: RefuseCase, *, bad: bool) -> None:
        """Take what is sound, refuse what is bad; asked only of who takes cases of the task `refuse`."""
        ...
