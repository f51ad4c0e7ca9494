"""A pretrained network that trains, and what its quantised scales are shifted by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from parity.case.base import Case, Model, Task, Tolerance
from parity.case.stepped import SteppedCase


@dataclass(frozen=True, kw_only=True)
class NetworkCase(SteppedCase):
    """The gradient of every adapter of a network, on real text."""

    model: ClassVar[Model] = "pretrained"

    inputs: Literal["one-hot", "text"] = "text"
    blocks: int
    """Decoder blocks that are kept."""

    @property
    def tolerance(self) -> Tolerance:
        """Whole networks have a limit on the 2-norm, by the oracle's own sensitivity to rounding."""
        return "twin" if self.inputs == "one-hot" else "norm"

    @property
    def _word(self) -> str:
        return "one-hot" if self.inputs == "one-hot" else "sensitivity"

    @property
    def _shape_word(self) -> str:
        return f"{self.blocks}-blocks"

    def is_row_parallel(self, layer: str) -> bool:
        """As a Llama's plan has it."""
        return layer.endswith(("o_proj", "down_proj"))

    @property
    def learning_rate(self) -> float:
        """Smaller than a stack's."""
        return 2.0**-7

    def offsets(self) -> OffsetCase:
        """What must be asked before the oracle can be."""
        kept = ("subject", "rank", "alpha", "rank_stabilized", "base", "blocksize", "flat", "compute", "seed", "blocks")
        return OffsetCase(link="frameworks", **{name: getattr(self, name) for name in kept})


@dataclass(frozen=True, kw_only=True)
class OffsetCase(Case):
    """What each quantised layer's scales are shifted by: data, which the oracle decodes with (Q4)."""

    task: ClassVar[Task] = "offsets"
    model: ClassVar[Model] = "pretrained"

    blocks: int
    """Decoder blocks that are kept."""

    @property
    def tolerance(self) -> Tolerance:
        """A mean in float32, in any order of summation."""
        return "bound"

    @property
    def _word(self) -> str:
        return "offsets"

    @property
    def _shape_word(self) -> str:
        return f"{self.blocks}-blocks"
