"""How a step is made, beside the plain one: accumulation, clipping, AdamW, recomputation, resumption (T1 to T6)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from parity.case import SteppedCase
from parity.folders import own_prefix
from parity.implementations.observed import whole_shard
from parity.shard import Shard
from torch_impl.files import checkpoint
from torch_impl.training import optim
from torch_impl.training.accumulation import backpropagate


def optimizer_for(model: nn.Module, case: SteppedCase, *, rate: float | None = None) -> Optimizer:
    """T3: SGD with momentum, or AdamW as `torch_impl` makes it, over what trains; at the case's rate unless told."""
    lr = case.learning_rate if rate is None else rate
    if case.optimizer == "adamw":
        return optim.make_optimizer(model, "adamw", lr=lr, weight_decay=case.weight_decay)
    optimizer = optim.make_optimizer(model, "sgd", lr=lr, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["momentum"] = case.momentum  # dyadic, so that a lattice's momenta are exact
    return optimizer


def backward(model: nn.Module, case: SteppedCase, sums: Sequence[Callable[[], Tensor]]) -> float:
    """T1: one step's gradient, of one forward or of several; the loss that was backpropagated here."""
    if case.accumulate == 1:
        (summed,) = sums
        loss = summed()
        loss.backward()
        return float(loss.detach())
    world = (
        1 if case.inputs == "one-hot" else case.input_world
    )  # a one-hot gradient is not multiplied before it is averaged
    return world * backpropagate(model, sums, total=case.tokens, world_size=world, late=case.late)


class CollectiveCounter(TorchDispatchMode):
    """S7, S9, S11, T5: counts how often this rank gathers, reduces and scatters, and reduces; by torch's dispatcher."""

    KINDS = (("all_gather", "allgather"), ("reduce_scatter", "reducescatter"), ("all_reduce", "allreduce"))
    """What is counted, in this order, by either spelling that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(len(self.KINDS), dtype=np.int64)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation, counted where it belongs to a collective library."""
        if func.namespace in {"c10d", "_c10d_functional"}:
            name = func.__name__
            self.counts += [any(spelling in name for spelling in kind) for kind in self.KINDS]
        return func(*args, **(kwargs or {}))

    def shard(self, step: int) -> Shard:
        """The counts of one step, as this rank's."""
        return whole_shard("step", "collectives", step, self.counts)


def clip_gradients(model: nn.Module, case: SteppedCase) -> None:
    """T2, S5: by one norm over all shards of all ranks."""
    if case.clip:
        optim.clip(model, norm=optim.gradient_norm(model, replicas=case.copies), limit=case.clip)


def resumed(
    model: nn.Module, optimizer: Optimizer, case: SteppedCase, fresh: Callable[[], nn.Module]
) -> tuple[nn.Module, Optimizer]:
    """T6, S12: save, and read into a fresh model and optimizer; every rank of the case takes part."""
    with common_folder() as folder:
        checkpoint.save(folder, model, optimizer, checkpoint.Saved(case.resumes_after, 0, {}))
        model = fresh()
        optimizer = optimizer_for(model, case, rate=2 * case.learning_rate)  # what was saved must overwrite it
        checkpoint.load_(folder / f"step-{case.resumes_after:06d}", model, optimizer)
        distributed.barrier()
    return model, optimizer


@contextlib.contextmanager
def common_folder() -> Iterator[Path]:
    """One folder for all ranks, gone afterwards."""
    first = distributed.get_rank() == 0
    place = [tempfile.mkdtemp(prefix=own_prefix()) if first else ""]
    distributed.broadcast_object_list(place)
    try:
        yield Path(place[0])
    finally:
        if first:
            shutil.rmtree(place[0], ignore_errors=True)
