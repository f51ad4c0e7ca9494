"""The loop that every torch implementation of a stack shares: build, shard, and step.

A third party subclasses `TorchStack` and gives `layer`; it overrides `shard` where it shards in its own way.
The loop gives the gradients of each step, and parameters and the optimizer's state after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from parity.case import UNSHARDED, Case
from parity.implementations.torch_training import backward, clip_gradients, optimizer_for, recomputed, resumed
from parity.inputs import masks, parts, stack_inputs
from parity.job import Place
from parity.shard import Shard
from torch_impl import local_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Stack(nn.Module):
    """Linear layers named `layers.0`, `layers.1`, with an activation between."""

    recompute = False
    """Whether each layer's forward is run again in the backward pass (T5)."""

    def __init__(self, layers: list[nn.Module], activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = torch.relu if activation == "relu" else nn.Identity()

    def forward(self, x: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """`x (tokens, in)` to `(tokens, out)`; with dropout each layer is told which of its inputs it keeps (D9)."""
        for position, layer in enumerate(self.layers):
            x = self.activation(x) if position else x
            told = (x, *masks[position : position + 1])
            x = recomputed(layer, *told, use_reentrant=False) if self.recompute else layer(*told)
        return x


class TorchStack:
    """Subclass me: `layer` gives one DoRA layer with parameters `lora_A`, `lora_B`, `magnitude`."""

    strategies: tuple[str, ...] = (UNSHARDED,)
    bases: tuple[str, ...] = ("float32",)
    computes: tuple[str, ...] = ("float32",)
    scalings: tuple[str, ...] = ("by the rank",)
    """Add `rank-stabilised` where `case.rank_stabilized` is heeded (D1)."""
    dropouts: tuple[bool, ...] = (False,)
    """Add True where a layer's forward takes a mask, `layer(x, keep)`, and `case.dropout` is heeded (D9)."""
    links: tuple[str, ...] = ("algebra", "shards", "frameworks")
    """Add `training` where the loop's way to accumulate, clip, save and load is what you want to put to the proof."""

    def layer(self, case: Case, arrays: dict[str, torch.Tensor]) -> nn.Module:
        """One layer from `weight`, `lora_A`, `lora_B`, `magnitude` and, in some cases, `bias`."""
        raise NotImplementedError

    def shard(self, model: nn.Module, case: Case) -> nn.Module:
        """Shard the whole stack; called under every strategy but `none`."""
        raise NotImplementedError

    def refuses(self, case: Case) -> str | None:
        """By what the class attributes declare."""
        for what, value, known in (
            ("model", case.model, ("stack",)),
            ("link", case.link, self.links),
            ("task", case.task, ("train",)),
            ("proof", case.proof, ("lattice", "one-hot", "bound")),
            ("strategy", case.strategy, self.strategies),
            ("base", case.base, self.bases),
            ("compute", case.compute, self.computes),
            ("dropout", case.dropout, self.dropouts),
            ("scaling", "rank-stabilised" if case.rank_stabilized else "by the rank", self.scalings),
        ):
            if value not in known:
                return f"its {what} {value!r} is not declared by {type(self).__name__}"
        return None

    def build(self, case: Case, device: str) -> nn.Module:
        """The unsharded stack, with the case's numbers in it."""
        inputs = {name: torch.from_numpy(array.copy()).to(device) for name, array in stack_inputs(case).items()}
        layers = []
        for position in range(len(case.layers)):
            prefix = f"layers.{position}."
            arrays = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
            layers.append(self.layer(case, arrays))
        return Stack(layers, case.activation)

    def run(self, case: Case, place: Place) -> Iterator[Shard]:
        """Build, shard, train; give this rank's shards at every step."""
        dtype = DTYPES[case.compute]
        keeps = masks(case, place.rank) if case.dropout else [[]] * case.steps
        data = [
            [tuple(_shaped(part, case).to(place.device, dtype) for part in batch) for batch in forwards]
            for forwards in parts(case, place.rank)
        ]

        def made(strategy: str) -> nn.Module:
            model = self.build(case, place.device)
            if isinstance(model, Stack):
                model.recompute = case.recompute
            return model if strategy == UNSHARDED else self.shard(model, dataclasses.replace(case, strategy=strategy))

        def losses(model: nn.Module, step: int) -> list[Callable[[], Tensor]]:
            keep = [_shaped(mask, case).to(place.device) for mask in keeps[step]]
            return [partial(_loss_sum, model, x, G, *keep) for x, G in data[step]]

        yield from train(made, case, losses)


def _loss_sum(model: nn.Module, x: Tensor, G: Tensor, *keep: Tensor) -> Tensor:
    """`sum(G * y)`."""
    return (model(x, *keep) * G).sum()


def _shaped(tokens: np.ndarray, case: Case) -> torch.Tensor:
    """(tokens, features), or two sequences of half as many tokens."""
    tensor = torch.from_numpy(tokens)
    return tensor.reshape(2, -1, tensor.shape[1]) if case.batched else tensor


def train(
    made: Callable[[str], nn.Module], case: Case, losses: Callable[[nn.Module, int], list[Callable[[], Tensor]]]
) -> Iterator[Shard]:
    """Step, giving shards: gradients, parameters and the optimizer's state by step; frozen weights before and after.

    `made` gives a fresh model under a strategy, `losses` what computes the sums of a step's forwards.
    """
    model = made(case.strategy)
    optimizer = optimizer_for(model, case)
    yield from shards_now(model, 0, ("parameter",), frozen=True)
    for step in range(1, case.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        backward(model, case, losses(model, step - 1))
        settle_gradients(model, case)
        clip_gradients(model, case)
        yield from shards_now(model, step, ("gradient",), frozen=True)  # a frozen tensor must have none
        optimizer.step()
        last = step == case.steps and case.model == "stack"  # a network's are large, and are shown to have no gradient
        yield from shards_now(model, step, ("parameter", *case.state_kinds), optimizer, frozen=last)
        if step == case.resumes_after < case.steps:
            model, optimizer = resumed(model, optimizer, case, partial(made, case.resume))


def shards_now(
    model: nn.Module,
    step: int,
    kinds: tuple[str, ...],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    frozen: bool = False,
) -> Iterator[Shard]:
    """What this rank holds now, of the adapters or of everything."""
    for local in local_shards(model, optimizer):
        of_adapter = local.name.endswith(("lora_A", "lora_B", "magnitude"))
        if local.kind not in kinds or not (of_adapter or frozen):
            continue
        yield Shard(
            name=local.name,
            kind=local.kind,
            step=step,
            global_shape=tuple(local.global_shape),
            index=local.index,
            array=to_numpy(local.tensor),
        )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy in the same dtype; bfloat16 by its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def settle_gradients(model: nn.Module, case: Case) -> None:
    """For the unsharded twin of a one-hot case: what the mean over ranks does to the only non-zero gradient."""
    if case.divide_gradients_by == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(case.divide_gradients_by)
