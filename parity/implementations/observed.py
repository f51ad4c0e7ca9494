"""What a step lets one see beside its gradients: outputs, losses, input gradients, norms, settings, collectives.

Axes: T tokens of one forward, I in, O out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from parity.case import SteppedCase
from parity.implementations.held import Held
from parity.inputs import forward_tokens
from parity.shard import Shard, whole_index

SETTINGS = ("lr", "momentum", "betas", "eps", "weight_decay")
"""What an optimizer's parameter groups say, where they say it."""


@dataclass
class Forwards:
    """The forwards of one step on this rank, in their order."""

    inputs: list[Tensor] = field(default_factory=list)
    """(T, I) leaves, so that the backward pass leaves dx on them."""
    outputs: list[Tensor] = field(default_factory=list)
    """(T, O)."""
    loss: float = 0.0
    """This rank's, as it was backpropagated: S3's world size is in it."""

    def shards(self, case: SteppedCase, step: int, rank: int) -> Iterator[Shard]:
        """The loss, and y and dx where they are observed, each at the place of its tokens among all.

        In a one-hot case the tokens of the rank whose turn it is are all there are.
        """
        hot = case.hot_rank(step - 1)
        if hot is not None and not case.twin_world and hot != case.data_rank(rank):
            return
        if self.outputs:
            yield from self._passes(case, step, rank)
        place, world = (case.data_rank(rank), case.input_world) if hot is None else (0, 1)
        yield Shard(
            name="loss",
            kind="loss",
            step=step,
            global_shape=(world,),
            index=(slice(place, place + 1),),
            array=np.array([self.loss]),
        )

    def _passes(self, case: SteppedCase, step: int, rank: int) -> Iterator[Shard]:
        hot, tokens = case.hot_rank(step - 1), forward_tokens(case, rank, step - 1)
        total = case.tokens if hot is None else sum(part.stop - part.start for part in tokens)
        start = 0 if hot is None else tokens[0].start
        for part, x, y in zip(tokens, self.inputs, self.outputs, strict=True):
            rows = slice(part.start - start, part.stop - start)
            yield _rows("y", "output", step, y, rows=rows, total=total)
            if x.grad is not None:
                yield _rows("x", "input_gradient", step, x.grad, rows=rows, total=total)


def _rows(name: str, kind: str, step: int, tensor: Tensor, *, rows: slice, total: int) -> Shard:
    array = to_numpy(tensor.reshape(-1, tensor.shape[-1]))
    shape = (total, array.shape[1])
    index = (rows, slice(0, array.shape[1]))
    return Shard(name=name, kind=kind, step=step, global_shape=shape, index=index, array=array)


def whole_shard(name: str, kind: str, step: int, array: np.ndarray) -> Shard:
    """A tensor that this rank has whole."""
    return Shard(name=name, kind=kind, step=step, global_shape=array.shape, index=whole_index(array.shape), array=array)


def settings_now(optimizer: torch.optim.Optimizer, step: int) -> Iterator[Shard]:
    """T3, T6: every group's settings, and how many steps the state has counted, as float64."""
    for group in optimizer.param_groups:
        for name in SETTINGS:
            if name in group:
                values = np.array(group[name], dtype=np.float64).reshape(-1)
                yield whole_shard(name, "setting", step, values)
    counted = {float(state["step"]) for p, state in optimizer.state.items() if "step" in state and p.numel()}
    if counted:
        yield whole_shard("step", "setting", step, np.array(sorted(counted)))


def generator_now(name: str, step: int) -> Shard:
    """T6: the state of the generator that dropout draws from, by its digest."""
    return whole_shard(name, "generator", step, _digest(torch.get_rng_state()))


def frozen_digests(parts: Iterable[Held], step: int) -> Iterator[Shard]:
    """A digest of each frozen tensor's part on this rank: of networks, whose weights are too large to send."""
    for local in parts:
        if local.kind == "parameter" and not local.name.endswith(("lora_A", "lora_B", "magnitude")):
            yield whole_shard(local.name, "digest", step, _digest(local.tensor))


def _digest(tensor: Tensor) -> np.ndarray:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.frombuffer(hashlib.sha256(raw.tobytes()).digest(), dtype=np.uint8).copy()


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy in the same dtype; bfloat16 by its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()
