"""D3: a layer's weight as rows of numbers, one row an output feature, from its shapes alone.

    kind                        weight as stored    a row                    groups
    nn.Linear                   (O, I)              I inputs                 1
    transformers' Conv1D        (I, O)              I inputs                 1
    nn.Embedding                (V, O)              V tokens                 1
    nn.Conv1d, Conv2d, Conv3d   (O, I / G, kernel)  I / G channels, kernel   G

A holds the rank's R rows of each group in turn, `(G R, row)`; B `(O, R)` the numbers by which an output feature takes
its own group's R rows, with a kernel of ones where the layer is a convolution; m `(O)`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch_impl.config import DoraConfig

Kind = Literal["linear", "conv1d", "embedding", "convolution"]


@dataclass(frozen=True)
class Rows:
    """A layer's weight as rows."""

    kind: Kind
    """`conv1d` is transformers', a linear layer; `convolution` any of torch's."""
    out: int
    """O, the output features: each has a magnitude."""
    row: tuple[int, ...]
    """The shape of a row: (I), (V), or (I / G, kernel)."""
    groups: int = 1
    """G: rows of one group read the same numbers."""

    @property
    def length(self) -> int:
        """K, the numbers of a row."""
        return math.prod(self.row)

    @property
    def matrix(self) -> tuple[int, int]:
        """One group's part of the weight as a matrix, (O / G, K): a rank above both of its sides adds nothing."""
        return self.out // self.groups, self.length

    def adapter_shapes(self, config: DoraConfig) -> dict[str, tuple[int, ...]]:
        """The adapter's parameters in the order in which layers register them; no magnitude for `method="lora"`."""
        ones = (1,) * (len(self.row) - 1)
        shapes = {"lora_A": (self.groups * config.rank, *self.row), "lora_B": (self.out, config.rank, *ones)}
        return shapes | {"magnitude": (self.out,)} if config.method == "dora" else shapes
