"""Layers of every kind with exactly representable numbers: torch's module, and its `Inputs` in the shapes it stores.

Rows of V hold the largest power of four that fits of +-1 and otherwise 0, so that norms are powers of two; all else is
small integers and dyadic fractions. No route rounds anything, so any two agree to the bit, in float32 and in float64.
"""

from collections.abc import Callable

import torch
from reference import Inputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SCALING = 0.5
BATCH = 2
SIZE = 6


def convolution(dims: int, *, channels: int = 4, out: int = 6, **options: object) -> nn.Module:
    """A convolution with a kernel of (3, 2, 1) or its beginning."""
    kind = getattr(nn, f"Conv{dims}d")
    return kind(channels, out, (3, 2, 1)[:dims], **options)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: convolution(1),
    "1d-strided": lambda: convolution(1, stride=2, padding=1),
    "2d": lambda: convolution(2, bias=False),
    "2d-strided": lambda: convolution(2, stride=(2, 3), padding=(1, 0)),
    "2d-same": lambda: convolution(2, padding="same"),  # two zeros on one axis, one at its far end on the other
    "3d": lambda: convolution(3, stride=(1, 2, 1), padding=(1, 0, 0)),
    "1d-dilated": lambda: convolution(1, padding=2, dilation=2),
    "1d-same-dilated": lambda: convolution(1, padding="same", dilation=2),
    "1d-causal": lambda: convolution(1, channels=6, out=6, padding=2, groups=6),
    "2d-dilated-groups": lambda: convolution(2, stride=(2, 1), padding=1, dilation=(2, 1), groups=2),
    "3d-groups": lambda: convolution(3, stride=(1, 1, 2), padding=(0, 1, 0), dilation=(1, 2, 1), groups=2),
    "2d-circular": lambda: convolution(2, padding=1, padding_mode="circular"),
    "1d-reflect-same": lambda: convolution(1, padding="same", padding_mode="reflect"),
    "2d-replicate-groups": lambda: convolution(2, padding=(2, 1), padding_mode="replicate", groups=2, bias=False),
}
"""Every dimension, stride, dilation, group and kind of padding."""
PEFTS_CONVOLUTIONS = ["1d", "1d-strided", "2d", "2d-strided", "2d-same", "3d"]
"""Those where peft has the same function."""
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 10),
    "conv1d": lambda: Conv1D(10, 24),
    "embedding": lambda: nn.Embedding(20, 10),
    "embedding-padding": lambda: nn.Embedding(20, 10, padding_idx=3),
}
KINDS = OTHERS | CONVOLUTIONS


def rows(module: nn.Module) -> Tensor:
    """The weight as (O, row): what `stored` undoes."""
    return module.weight.T if isinstance(module, Conv1D | nn.Embedding) else module.weight


def by_groups(A: Tensor, B: Tensor, *, groups: int) -> Tensor:
    """B A, each group by itself, (O, K)."""
    rank = B.shape[1]
    return torch.bmm(B.reshape(groups, -1, rank), A.reshape(groups, rank, -1)).reshape(B.shape[0], -1)


def lattice_of(module: nn.Module, *, rank: int = 2, seed: int = 0) -> Inputs:
    """Inputs for a layer; the module is given their weight and bias."""
    g = torch.Generator().manual_seed(seed)

    def integers(*shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=g).float()

    out, *row = rows(module).shape
    groups = getattr(module, "groups", 1)
    length = torch.Size(row).numel()
    V = torch.zeros(out, length)
    terms = 4 ** int(torch.tensor(float(length)).log2().div(2) + 1e-6)
    for row_V in V:
        row_V[torch.randperm(length, generator=g)[:terms]] = integers(terms, low=0, high=2) * 2 - 1
    A = integers(groups * rank, *row, low=-1, high=2)
    B = integers(out, rank, *(1,) * (len(row) - 1), low=-1, high=2)
    W = (V - SCALING * by_groups(A, B, groups=groups)).reshape(out, *row)
    with torch.no_grad():
        rows(module).copy_(W)
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(integers(out))
        x = input_of(module, integers)
        G = integers(*module(x).shape)
    m = torch.exp2(integers(out, low=0, high=3))
    b = getattr(module, "bias", None)
    return Inputs(
        module.weight.detach().clone(), A, B, m, x, G, scaling=SCALING, b=None if b is None else b.detach().clone()
    )


def input_of(module: nn.Module, integers: Callable[..., Tensor]) -> Tensor:
    """What this kind of layer reads; an embedding sees an id twice, and its padding."""
    if isinstance(module, nn.Embedding):
        ids = integers(BATCH, SIZE, low=0, high=module.num_embeddings).long()
        ids[0, :3] = torch.tensor([3, 5, 5])
        return ids
    if isinstance(module, nn.Linear | Conv1D):
        return integers(BATCH, SIZE, rows(module).shape[1])
    return integers(BATCH, module.in_channels, *(SIZE,) * len(module.kernel_size))
