"""D16: a case's layers as experts of one stack, and what a rank holds of the stack, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from parity.case import StackCase, TrainCase
from parity.implementations.held import Held
from parity.implementations.torch_stack import Stack
from parity.inputs import stack_inputs

LEAF = "matrices"
"""The stack's name in its module."""
PLACE = f"layers.0.{LEAF}"
"""Its name in the model."""


class ExpertsInTurn(nn.Module):
    """A module of experts as transformers has them, whose every token visits one expert after the other."""

    def __init__(self, matrices: Tensor, case: TrainCase) -> None:
        super().__init__()
        self.is_transposed = case.experts == "in-out"
        self.visited = case.visited
        self.activation = torch.relu if case.activation == "relu" else nn.Identity()
        self.matrices = nn.Parameter(matrices.mT.contiguous() if self.is_transposed else matrices)

    def forward(self, x: Tensor) -> Tensor:
        """`x (tokens, in)` to `(tokens, out)`."""
        for expert in range(self.visited):
            x = self.activation(x) if expert else x
            matrix = self.matrices[expert]
            x = x @ matrix if self.is_transposed else functional.linear(x, matrix)
        return x


def plain_experts(case: TrainCase, device: str, dtype: torch.dtype) -> nn.Module:
    """The base, as it was before any adapter."""
    inputs = stack_inputs(case)
    matrices = [torch.from_numpy(inputs[f"layers.{position}.weight"]) for position in range(len(case.layers))]
    return Stack([ExpertsInTurn(torch.stack(matrices).to(dtype), case)], "identity").to(device)


@torch.no_grad()
def fill_experts(model: nn.Module, case: StackCase) -> None:
    """The case's factors and magnitudes."""
    inputs = stack_inputs(case)
    for leaf, parameter in model.get_submodule(PLACE).named_parameters(recurse=False):
        each = [torch.from_numpy(inputs[f"layers.{position}.{leaf}"]) for position in range(len(case.layers))]
        parameter.copy_(torch.stack(each))


def by_expert(parts: Iterable[Held], count: int) -> Iterator[Held]:
    """Each part of the stack's tensors as parts of its experts', which have a layer's names."""
    for part in parts:
        leaf = part.name.removeprefix(f"{PLACE}.")
        shape = part.global_shape
        own = shape[1:] if shape[0] == count else (shape[0] // count, *shape[1:])
        flat = len(part.index) < len(shape)
        rows = math.prod(own) if flat else 1 if shape[0] == count else own[0]
        start, stop = part.index[0].start, part.index[0].stop
        for expert in range(count):
            low, high = (min(max(expert * rows + end, start), stop) for end in (0, rows))
            inside, here = part.tensor[low - start : high - start], slice(low - expert * rows, high - expert * rows)
            if high <= low:
                inside, here = inside[:0], slice(0, 0)
            if not flat and shape[0] == count:  # an expert is a row, there or not
                inside = inside.reshape(-1, *own[1:]) if high > low else inside.new_zeros((0, *own[1:]))
                here = slice(0, own[0] if high > low else 0)
                index = (here, *part.index[2:])
            else:
                index = (here, *part.index[1:])
            yield Held(f"layers.{expert}.{leaf}", part.kind, own, index, inside)
