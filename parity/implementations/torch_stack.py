"""The loop that every torch implementation of a stack shares: build, shard, and step.

A third party subclasses `TorchStack` and gives `layer`; it overrides `shard` where it shards in its own way.
The loop gives outputs, losses, input gradients and gradients of each step, and parameters and the optimizer's state
after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from parity.case import UNSHARDED, Case, StackCase, SteppedCase, TrainCase
from parity.implementations.held import Held, held
from parity.implementations.observed import (
    Forwards,
    frozen_digests,
    generator_now,
    settings_now,
    to_numpy,
)
from parity.implementations.torch_training import (
    CollectiveCounter,
    backward,
    clip_gradients,
    optimizer_for,
    resumed,
)
from parity.inputs import masks, parts, stack_inputs
from parity.job import Place
from parity.shard import Shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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
    methods: tuple[str, ...] = ("dora",)
    """Add `lora` where `case.method` is heeded: then there is no magnitude."""
    links: tuple[str, ...] = ("algebra", "shards", "frameworks")
    """Add `training` where the loop's way to accumulate, clip, save and load is what you want to put to the proof."""
    units = ""
    """`layer` where the units are S7's, so that the reference can predict what each rank holds."""
    gives: tuple[str, ...] = ("output", "input_gradient", "loss")
    """What it can be asked for beside gradients, parameters and the optimizer's state; the loop gives these."""

    def layer(self, case: StackCase, arrays: dict[str, torch.Tensor]) -> nn.Module:
        """One layer from `weight`, `lora_A`, `lora_B`, `magnitude` and, in some cases, `bias`."""
        raise NotImplementedError

    def shard(self, model: nn.Module, case: Case) -> nn.Module:
        """Shard the whole stack; called under every strategy but `none`."""
        raise NotImplementedError

    def observe(self, model: nn.Module, case: SteppedCase) -> Callable[[int], Iterator[Shard]]:
        """Watch the layers of a model that has just been made; called after a step, it gives what they computed."""
        del model, case
        return lambda _: iter(())

    def holds(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Held]:
        """What this rank holds of a model, read from torch's own records; override it where torch keeps none."""
        return held(model, optimizer)

    def refuses(self, case: Case) -> str | None:
        """By what the class attributes declare; only a stack that trains has anything to declare."""
        asked: list[tuple[str, object, tuple[object, ...]]] = [
            ("model", case.model, ("stack",)),
            ("link", case.link, self.links),
            ("task", case.task, ("train",)),
        ]
        if isinstance(case, TrainCase):
            asked += [
                ("strategy", case.strategy, self.strategies),
                ("base", case.base, self.bases),
                ("compute", case.compute, self.computes),
                ("dropout", bool(case.dropout), self.dropouts),
                ("method", case.method, self.methods),
                ("experts", bool(case.experts), (False,)),
                ("compiled", case.compiled, (False,)),
                ("scaling", "rank-stabilised" if case.rank_stabilized else "by the rank", self.scalings),
            ]
        for what, value, known in asked:
            if value not in known:
                return f"its {what} {value!r} is not declared by {type(self).__name__}"
        return None

    def build(self, case: StackCase, device: str) -> nn.Module:
        """The unsharded stack, with the case's numbers in it."""
        inputs = {name: torch.from_numpy(array.copy()).to(device) for name, array in stack_inputs(case).items()}
        layers = []
        for position in range(len(case.layers)):
            prefix = f"layers.{position}."
            arrays = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
            layers.append(self.layer(case, arrays))
        return Stack(layers, case.activation)

    def run(self, case: TrainCase, place: Place) -> Iterator[Shard]:
        """Build, shard, train; give this rank's shards at every step."""
        observer: list[Callable[[int], Iterator[Shard]]] = []

        def made(strategy: str) -> nn.Module:
            model = self.build(case, place.device)
            if isinstance(model, Stack):
                model.recompute = case.recompute
            observer[:] = [self.observe(model, case)]
            return model if strategy == UNSHARDED else self.shard(model, dataclasses.replace(case, strategy=strategy))

        def losses(model: nn.Module, step: int) -> tuple[Forwards, list[Callable[[], Tensor]]]:
            seen = Forwards()
            return seen, [partial(_loss_sum, model, seen, *batch) for batch in _data(case, place)[step]]

        def observed(step: int) -> Iterator[Shard]:
            return observer[0](step)  # a resumed run has another

        yield from train(made, case, losses, rank=place.rank, holds=self.holds, observed=observed)


def _data(case: TrainCase, place: Place) -> list[list[tuple[Tensor, ...]]]:
    """By step and forward: x, G and the masks."""
    dtype = DTYPES[case.compute]
    keeps = masks(case, place.rank) if case.dropout else None
    data = []
    for step, forwards in enumerate(parts(case, place.rank)):
        data.append([])
        for number, (x, G) in enumerate(forwards):
            keep = keeps[step][number] if keeps else []
            numbers = [_shaped(part, case).to(place.device, dtype) for part in (x, G)]
            data[-1].append((*numbers, *(_shaped(mask, case).to(place.device) for mask in keep)))
    return data


def _loss_sum(model: nn.Module, seen: Forwards, x: Tensor, G: Tensor, *keep: Tensor) -> Tensor:
    """`sum(G * y)` in float64: the loss is the suite's, and must not be its own largest error."""
    x = x.requires_grad_()
    y = model(x, *keep)
    seen.inputs.append(x)
    seen.outputs.append(y.detach())
    return (y.double() * G.double()).sum()


def _shaped(tokens: np.ndarray, case: TrainCase) -> torch.Tensor:
    """(tokens, features), or two sequences of half as many tokens."""
    tensor = torch.from_numpy(tokens.copy())
    return tensor.reshape(2, -1, tensor.shape[1]) if case.batched else tensor


Losses = Callable[[nn.Module, int], tuple[Forwards, list[Callable[[], Tensor]]]]
"""From the model and a step to what its forwards let one see, and what computes the sum of each."""
Holds = Callable[..., Iterator[Held]]
"""From a model, and an optimizer or none, to what this rank holds of them."""


def train(
    made: Callable[[str], nn.Module],
    case: SteppedCase,
    losses: Losses,
    *,
    rank: int,
    holds: Holds,
    observed: Callable[[int], Iterator[Shard]] = lambda _: iter(()),
) -> Iterator[Shard]:
    """Step, giving shards: all that a step computes, parameters and state after it, frozen weights before and after.

    `made` gives a fresh model under a strategy.
    """
    if case.resume:
        torch.manual_seed(1 + rank)  # so that no two ranks could resume with each other's generator
    model = made(case.strategy)
    optimizer = optimizer_for(model, case)
    yield from _frozen_and_adapters(holds(model), case, 0)
    for step in range(1, case.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        seen, sums = losses(model, step - 1)
        counter = CollectiveCounter() if case.counted else None
        with counter or contextlib.nullcontext():
            seen.loss = backward(model, case, sums)
        yield from [counter.shard(step)] if counter else []
        yield from seen.shards(case, step, rank)
        yield from observed(step)
        settle_gradients(model, case)
        clip_gradients(model, case)
        yield from shards_now(holds(model), step, ("gradient",), frozen=True)  # a frozen tensor must have none
        optimizer.step()
        yield from shards_now(holds(model, optimizer), step, ("parameter", *case.state_kinds))
        yield from settings_now(optimizer, step)
        if step == case.resumes_after < case.steps:
            yield generator_now("before", step)
            model, optimizer = resumed(model, optimizer, case, partial(made, case.resume))
            yield generator_now("after", step)
            yield from settings_now(optimizer, step)
    yield from _frozen_and_adapters(holds(model), case, case.steps, adapters=False)


def _frozen_and_adapters(
    parts: Iterable[Held], case: SteppedCase, step: int, *, adapters: bool = True
) -> Iterator[Shard]:
    """Parameters now; a network's frozen ones by their digests."""
    parts = list(parts)
    is_stack = isinstance(case, StackCase)
    yield from shards_now(parts, step, ("parameter",), frozen=is_stack, adapters=adapters)
    yield from () if is_stack else frozen_digests(parts, step)


def shards_now(
    parts: Iterable[Held], step: int, kinds: tuple[str, ...], *, frozen: bool = False, adapters: bool = True
) -> Iterator[Shard]:
    """What this rank holds now, of the adapters, of what is frozen, or of both."""
    for local in parts:
        of_adapter = local.name.endswith(("lora_A", "lora_B", "magnitude"))
        if local.kind not in kinds or not (adapters if of_adapter else frozen):
            continue
        yield Shard(
            name=local.name,
            kind=local.kind,
            step=step,
            global_shape=tuple(local.global_shape),
            index=local.index,
            array=to_numpy(local.tensor),
        )


def settle_gradients(model: nn.Module, case: SteppedCase) -> None:
    """For the unsharded twin of a one-hot case: what the mean over ranks does to the only non-zero gradient."""
    if case.divide_gradients_by == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(case.divide_gradients_by)
