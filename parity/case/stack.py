"""Questions about a stack of linear layers: its shapes, and what is drawn for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from parity.case.base import Case, Model

StackInputs = Literal["lattice", "one-hot", "gaussian", "integers", "ties"]


@dataclass(frozen=True, kw_only=True)
class StackCase(Case):
    """A question about a stack; also the codec and a checkpoint have layers, one after the other."""

    model: ClassVar[Model] = "stack"

    layers: tuple[tuple[int, int], ...] = ()
    """`(in, out)` of each linear layer."""
    inputs: StackInputs = field(init=False, default="gaussian")
    """What is drawn; kinds that have a choice declare it again."""
    activation: Literal["identity", "relu"] = "identity"
    """What stands between two layers."""
    bias: bool = False
    """Whether the base layers have one (D8)."""
    zero_rows: bool = False
    """Whether some rows of V are zero (D7)."""
    hard_rows: bool = False
    """Whether some rows of V are tiny, some huge, and some nearly cancel s B A (D4, D13)."""
    zero_b: bool = False
    """Whether B starts at zero (D12)."""

    def is_row_parallel(self, layer: str) -> bool:
        """By output features where they divide among the tensor ranks, else by input features."""
        _, out = self.layers[int(layer.rpartition(".")[2])]
        return out % self.tensor_ranks != 0

    @property
    def visited(self) -> int:
        """How many of the layers have tokens: all, but of experts (D16)."""
        return len(self.layers)
