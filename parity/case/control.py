"""A planted bug (link 5). A kind of its own: no rank runs it, it stands for all the cases that the bug was tried on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from parity.case.base import Case, Link, Model, Task, Tolerance


@dataclass(frozen=True, kw_only=True)
class ControlCase(Case):
    """Named checks fail where the bug named `shape_name` is planted."""

    task: ClassVar[Task] = "control"
    model: ClassVar[Model] = "stack"

    link: Link = field(init=False, default="controls")
    subject: str = field(init=False, default="mutant")

    @property
    def tolerance(self) -> Tolerance:
        """The checks are named that must fail."""
        return "named"

    @property
    def _word(self) -> str:
        return "bound"
