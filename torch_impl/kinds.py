"""D3: every kind of layer as rows of numbers, one row an output feature, from its shapes alone.

    kind                        weight as stored    a row                    groups
    nn.Linear                   (O, I)              I inputs                 1
    transformers' Conv1D        (I, O)              I inputs                 1
    nn.Embedding                (V, O)              V tokens                 1
    nn.Conv1d, Conv2d, Conv3d   (O, I / G, kernel)  I / G channels, kernel   G

A holds the rank's R rows of each group in turn, `(G R, row)`; B `(O, R)` the numbers by which an output feature takes
its own group's R rows, with a kernel of ones where the layer is a convolution; m `(O)`.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from torch_impl.config import DoraConfig

Kind = Literal["linear", "conv1d", "embedding", "convolution"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


def rows_of(module: nn.Module) -> Rows | None:
    """The rows of a module's weight; None for a kind that DoRA isn't defined for here."""
    found: Any = module  # what torch's and transformers' classes call their sizes
    if isinstance(module, nn.Linear):
        return Rows("linear", found.out_features, (found.in_features,))
    if is_conv1d(module):
        return Rows("conv1d", found.nf, (found.nx,))
    if isinstance(module, nn.Embedding):
        return Rows("embedding", found.embedding_dim, (found.num_embeddings,))
    if isinstance(module, CONVOLUTIONS):
        row = (found.in_channels // found.groups, *found.kernel_size)
        return Rows("convolution", found.out_channels, row, found.groups)
    return None


def own_forward(module: nn.Module) -> bool:
    """Whether a subclass computes something else than its kind does, which an adapter in its place would not.

    Subclasses of nn.Linear are bitsandbytes' and their like, which differ in storage alone.
    """
    standard = (nn.Embedding, *CONVOLUTIONS)
    return any(isinstance(module, kind) and type(module).forward is not kind.forward for kind in standard)


def is_linear(module: nn.Module) -> bool:
    """What "all-linear" means: nn.Linear and transformers' Conv1D, as PEFT has it."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, GPT-2's linear layer of a transposed weight; transformers isn't imported."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)
