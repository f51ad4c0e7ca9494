"""How a step is made, beside the plain one: accumulation, clipping, AdamW, recomputation, resumption (T1 to T6)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint as recomputed

from parity.case import Case
from torch_impl import checkpoint, optim
from torch_impl.accumulation import backpropagate

__all__ = ["backward", "clip_gradients", "common_folder", "optimizer_for", "recomputed", "resumed"]


def optimizer_for(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    """T3: SGD with momentum, or AdamW as `torch_impl` makes it, over what trains."""
    if case.optimizer == "adamw":
        return optim.make_optimizer(model, "adamw", lr=case.learning_rate, weight_decay=case.weight_decay)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trainable, lr=case.learning_rate, momentum=case.momentum)


def backward(model: nn.Module, case: Case, sums: Sequence[Callable[[], Tensor]]) -> None:
    """T1: one step's gradient, of one forward or of several."""
    if case.accumulate == 1:
        (loss,) = sums
        loss().backward()
        return
    backpropagate(model, sums, total=case.tokens, world_size=case.world, late=case.late)


def clip_gradients(model: nn.Module, case: Case) -> None:
    """T2, S5: by one norm over all shards of all ranks."""
    if case.clip:
        optim.clip(model, norm=optim.gradient_norm(model, replicas=case.copies), limit=case.clip)


def resumed(
    model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, fresh: Callable[[], nn.Module]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """T6, S12: save, and read into a fresh model and optimizer; every rank of the case takes part."""
    with common_folder() as folder:
        checkpoint.save(folder, model, optimizer, checkpoint.Saved(case.resumes_after, 0, {}))
        model = fresh()
        optimizer = optimizer_for(model, case)
        checkpoint.load_(folder / f"step-{case.resumes_after:06d}", model, optimizer)
        distributed.barrier()
    return model, optimizer


@contextlib.contextmanager
def common_folder() -> Iterator[Path]:
    """One folder for all ranks, gone afterwards."""
    first = distributed.get_rank() == 0
    place = [tempfile.mkdtemp(prefix="dora-parity-") if first else ""]
    distributed.broadcast_object_list(place)
    try:
        yield Path(place[0])
    finally:
        if first:
            shutil.rmtree(place[0], ignore_errors=True)
