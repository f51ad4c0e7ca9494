"""What must be refused (Q7, Q8, C1, C3, C4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from parity.case.base import Task, Tolerance
from parity.case.stack import StackCase


@dataclass(frozen=True, kw_only=True)
class RefuseCase(StackCase):
    """Something sound is to be taken, then something bad refused."""

    task: ClassVar[Task] = "refuse"

    bad: str
    """What is to be refused, by name."""

    @property
    def tolerance(self) -> Tolerance:
        """The refusal names what is wrong."""
        return "named"

    @property
    def _word(self) -> str:
        return "refusal"

    @property
    def _said_first(self) -> tuple[str, ...]:
        return (self.bad,)
