"""DoRA on nn.Conv1d, Conv2d and Conv3d: a linear layer of the patches under the kernel, group by group.

Axes: N batch, I and O channels, G groups, R adapter rank; `row` is (I / G, kernel), `space` and `places` are the
spatial axes of x and y.
Clauses: D2, D3, D9, D12, G1.

With * the convolution in groups, y = c (x * W + s ((x * A) * B)) + b: A (G R, row) holds the rank's rows of each group
in turn, B (O, R, 1 ...) has a kernel of ones and reads its own group's R. Padding that is not of zeros, or not the same
at both ends, is laid around x beforehand, so that A reads the padded x as W does. (peft's A reads every group's
channels, knows no dilation, and pads with zeros: it is this function at groups 1, dilation 1, padding of zeros alone.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn import grad as transposes

from torch_impl.config import DoraConfig
from torch_impl.layers.bases import DenseBase
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.rows import Rows
from torch_impl.layers.rule import Operation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Window(Operation):
    """A convolution's operation: where the kernel goes, in torch's words, an entry for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    feature_axis: int = 1

    @property
    def _places(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def plain(self, x: Float[Tensor, "N I *space"], rows: Float[Tensor, "O *row"]) -> Float[Tensor, "N O *places"]:
        """Every row at every place."""
        return getattr(functional, f"conv{len(self.stride)}d")(x, rows, **self._places)

    def input_gradient(self, G: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        """The sum over the patches that a number stands in."""
        return getattr(transposes, f"conv{len(self.stride)}d_input")(shape, rows, G, **self._places)

    def rows_gradient(self, G: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The sum over places and batch."""
        return getattr(transposes, f"conv{len(self.stride)}d_weight")(x, shape, G, **self._places)


@dataclass(frozen=True)
class Border:
    """What is laid around x before the kernel goes over it."""

    widths: tuple[int, ...]
    """As torch's `pad` takes them: the last axis first, both of its ends."""
    mode: str
    """`pad`'s name of what the border holds; `constant` is zeros."""

    def around(self, x: Tensor) -> Tensor:
        """X with its border."""
        return functional.pad(x, self.widths, mode=self.mode)


class DoraConvolution(DoraLayer):
    """A convolution whose A, B and m train.

    Args:
        base: the frozen weight, (O, I / groups, kernel).
        module: the layer that it replaces: its bias, and where its kernel goes.
        config: `DoraLayer`'s.
    """

    kind = "convolution"

    def __init__(self, base: DenseBase, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, config: DoraConfig) -> None:
        ones = (1,) * len(module.kernel_size)
        padding, border = _padding(module)
        down = Window(module.stride, padding, module.dilation, module.groups)
        up = Window(ones, (0,) * len(ones), ones, module.groups)
        super().__init__(base, module.bias, config, rows=self.rows_in(module), down=down, up=up)
        self.border = border
        self.settings = {name: getattr(module, name) for name in SETTINGS}

    @staticmethod
    def standard() -> tuple[type[nn.Module], ...]:
        """Torch's own."""
        return CONVOLUTIONS

    @staticmethod
    def rows_in(module: Any) -> Rows:
        """A kernel over the channels of a group."""
        row = (module.in_channels // module.groups, *module.kernel_size)
        return Rows("convolution", module.out_channels, row, module.groups)

    @classmethod
    def over(cls, module: Any, base: Any, config: DoraConfig) -> "DoraConvolution":
        """With its bias and its settings."""
        return cls(base, module, config)

    def plain(self) -> nn.Module:
        """As many axes as it had."""
        kind = CONVOLUTIONS[len(self.rows.row) - 2]
        return kind(**self.settings, bias=self.bias is not None, device="meta")

    @staticmethod
    def to_peft(leaf: str, tensor: Tensor, rows: Rows) -> Tensor:
        """C1: the magnitude as (1, O, 1 ...)."""
        return tensor.reshape(1, rows.out, *(1,) * (len(rows.row) - 1)) if leaf == "magnitude" else tensor

    @property
    def is_pefts(self) -> bool:
        """PEFT's A reads every group's channels, knows no dilation, and pads with zeros."""
        found = self.settings
        return found["groups"] == 1 and found["padding_mode"] == "zeros" and set(found["dilation"]) == {1}

    def __getattr__(self, name: str) -> Any:
        """A convolution's own words, `stride` say, for a model that asks its layer."""
        settings = self.__dict__.get("settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The layer on x (N, I, space) or (I, space), any floating dtype; y has x's dtype.

        Args:
            x: the input.
            keep: which numbers of x dropout keeps, see `DoraLayer.forward`.
        """
        keep = self._drawn(x) if keep is None else keep
        if x.dim() == len(self.rows.row):
            whole = self.forward(x[None], None if keep is None else keep[None])
            return whole.squeeze(0).clone()  # FSDP2 warns of an output that is a view
        if self.border is not None:
            x = self.border.around(x)
            keep = None if keep is None else self.border.around(keep.to(x.dtype)) != 0
        return super().forward(x, keep)


SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)  # fmt: skip
"""What makes a convolution, besides its weight and bias: torch's names, which a layer has too."""


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, ...], Border | None]:
    """The zeros at both ends of each axis that the kernel's own pass adds, and what must be laid around beforehand."""
    none = (0,) * len(module.kernel_size)
    if isinstance(module.padding, tuple):
        ends = [(width, width) for width in module.padding]
    elif module.padding == "valid":
        ends = [(0, 0) for _ in none]
    else:  # "same": where the total is odd, the far end has one more
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        ends = [(total // 2, total - total // 2) for total in totals]
    zeros = module.padding_mode == "zeros"
    if zeros and all(near == far for near, far in ends):
        return tuple(near for near, _ in ends), None
    widths = tuple(width for pair in reversed(ends) for width in pair)
    return none, Border(widths, "constant" if zeros else module.padding_mode)
