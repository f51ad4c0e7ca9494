"""A fresh adapter changes nothing (D12). A kind of its own: the implementation is compared with itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from parity.case.base import Task, Tolerance
from parity.case.stack import StackCase


@dataclass(frozen=True, kw_only=True)
class NeutralCase(StackCase):
    """The output beside the plain layers' own."""

    task: ClassVar[Task] = "neutral"

    zero_b: bool = field(init=False, default=True)
    """It is what makes an adapter fresh."""

    @property
    def tolerance(self) -> Tolerance:
        """The plain layer's bits."""
        return "plain"

    @property
    def _word(self) -> str:
        return "neutral"
