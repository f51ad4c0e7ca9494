"""The magnitude at start (D6). A kind of its own: nothing trains, and only the magnitudes are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from parity.case.base import UNSHARDED, Task, Tolerance
from parity.case.stack import StackCase


@dataclass(frozen=True, kw_only=True)
class StartCase(StackCase):
    """The magnitudes that the layers give themselves, from the weight that the forward uses."""

    task: ClassVar[Task] = "start"

    inputs: Literal["gaussian", "integers"] = "gaussian"

    @property
    def tolerance(self) -> Tolerance:
        """The norm of integers is one rounding of a root; sharded it is the same number as unsharded."""
        if self.inputs == "integers":
            return "ulp"
        return "bound" if self.strategy == UNSHARDED else "twin"

    @property
    def _word(self) -> str:
        return "root" if self.inputs == "integers" else "start"
