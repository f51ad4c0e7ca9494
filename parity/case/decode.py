"""The four-bit codec alone (Q1 to Q6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from parity.case.base import Model, Task, Tolerance
from parity.case.stack import StackCase


@dataclass(frozen=True, kw_only=True)
class DecodeCase(StackCase):
    """Each layer's weight as it is packed, and as it is read back."""

    task: ClassVar[Task] = "decode"
    model: ClassVar[Model] = "codec"

    inputs: Literal["gaussian", "ties"] = "gaussian"
    """`ties` lie on the midpoints between two codes and on their float32 neighbours (Q5)."""

    @property
    def ties(self) -> bool:
        """As the identifier says it."""
        return self.inputs == "ties"

    @property
    def tolerance(self) -> Tolerance:
        """Every bit."""
        return "bits"

    @property
    def _word(self) -> str:
        return "decode"
