"""D3: a layer's weight as rows of numbers, one row an output feature, from its shapes alone.

    kind                        weight as stored    a row                    groups
    nn.Linear                   (O, I)              I inputs                 1
    transformers' Conv1D        (I, O)              I inputs                 1
    nn.Embedding                (V, O)              V tokens                 1
    nn.Conv1d, Conv2d, Conv3d   (O, I / G, kernel)  I / G channels, kernel   G
    experts (D16)               (E, O, I)           I inputs                 E, that share no input

A holds the rank's R rows of each group in turn, `(G R, row)`; B `(O, R)` the numbers by which an output feature takes
its own group's R rows, with a kernel of ones where the layer is a convolution; m `(O)`. Of experts each has an
axis E of its own: A `(E, R, I)`, B `(E, O, R)`, m `(E, O)`, where O is one expert's.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch_impl.config import DoraConfig

Kind = Literal["linear", "conv1d", "embedding", "convolution", "experts"]


@dataclass(frozen=True)
class Rows:
    """A layer's weight as rows."""

    kind: Kind
    """`conv1d` is transformers', a linear layer; `convolution` any of torch's."""
    out: int
    """O, the output features: each has a magnitude; of experts, those of all."""
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
        rank, ones = config.rank, (1,) * (len(self.row) - 1)
        shapes = {
            "lora_A": (self.groups * rank, *self.row),
            "lora_B": (self.out, rank, *ones),
            "magnitude": (self.out,),
        }
        if self.kind == "experts":
            experts, out = self.groups, self.matrix[0]
            shapes = {"lora_A": (experts, rank, *self.row), "lora_B": (experts, out, rank), "magnitude": (experts, out)}
        return {name: shape for name, shape in shapes.items() if name != "magnitude" or config.method == "dora"}
