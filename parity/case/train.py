"""A stack that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parity.case.base import Case, Tolerance
from parity.case.stack import StackCase
from parity.case.stepped import SteppedCase

FAINT = 2.0**-20
"""What the cotangent of a faint case is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class TrainCase(SteppedCase, StackCase):
    """Outputs, gradients, parameters and state of every step of a stack."""

    inputs: Literal["lattice", "one-hot", "gaussian"] = "gaussian"
    dropout: float = 0.0
    """The share of each layer's input that is dropped (D9), by masks that are inputs."""
    method: Literal["dora", "lora"] = "dora"
    """`lora` has no magnitude: c is 1."""
    batched: bool = False
    """Whether the tokens come as two sequences, `(2, tokens / 2, in)`."""
    experts: Literal["", "out-in", "in-out"] = ""
    """D16: whether the layers are experts of one stack, and how it is stored; all tokens visit them in turn, but for
    the last, which has none."""
    faint: bool = False
    """Whether gradients are so small that clipping's addend counts (S5)."""

    @property
    def tolerance(self) -> Tolerance:
        """A lattice is exact, unless a norm's root or a moment's takes part."""
        if self.inputs == "one-hot":
            return "twin"
        return "bitwise" if self.inputs == "lattice" and not self.clip and self.optimizer == "sgd" else "bound"

    @property
    def _word(self) -> str:
        return "bound" if self.inputs == "gaussian" else self.inputs

    @property
    def learning_rate(self) -> float:
        """As much larger as gradients are fainter."""
        return super().learning_rate / (FAINT if self.faint else 1.0)

    @property
    def visited(self) -> int:
        """How many of the layers have tokens."""
        return len(self.layers) - bool(self.experts)


def dropout_of(case: Case) -> float:
    """The share that is dropped (D9): none but where a stack trains."""
    return case.dropout if isinstance(case, TrainCase) else 0.0
