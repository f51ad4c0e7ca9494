"""Merged weights (D10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from parity.case.base import UNSHARDED, Task, Tolerance
from parity.case.stack import StackCase


@dataclass(frozen=True, kw_only=True)
class MergeCase(StackCase):
    """`c V` of each layer; a sharded adapter goes through its files."""

    task: ClassVar[Task] = "merge"

    inputs: Literal["lattice", "gaussian"] = "gaussian"

    @property
    def tolerance(self) -> Tolerance:
        """Unsharded the oracle's, exact on lattices; from the files of sharded adapters the same bits as without."""
        if self.strategy != UNSHARDED:
            return "twin"
        return "bitwise" if self.inputs == "lattice" else "bound"

    @property
    def _word(self) -> str:
        return {"twin": "files", "bitwise": "lattice"}.get(self.tolerance, "bound")

    @property
    def _said_first(self) -> tuple[str, ...]:
        return (self.task,)
