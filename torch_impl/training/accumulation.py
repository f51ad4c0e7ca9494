"""One step's gradient from several forwards: the mean over all tokens, of every rank and forward.

Clauses: S3, T1 (each forward's sum is divided by the tokens of all), T5 (reduced once, with the last backward).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def backpropagate(
    model: nn.Module,
    sums: Sequence[Callable[[], Tensor]],
    *,
    total: float,
    world_size: int,
    late: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> float:
    """S3, T1: backpropagate world * sum / total of each forward, one after the other; gradients are added.

    Args:
        model: sharded by any strategy, or not at all.
        sums: for each forward, what computes it and gives this rank's summed loss.
        total: tokens of all forwards on all ranks.
        world_size: ranks over which gradients are averaged.
        late: reduce once, with the last backward (T5); otherwise with each.
        note: told what is under way.

    Returns:
        This rank's part of the mean loss.
    """
    loss_here = 0.0
    for number, loss_sum in enumerate(sums, 1):
        with synchronised(model, when=not late or number == len(sums)):
            note(f"forward {number} of {len(sums)}")
            loss = loss_sum() / total
            note(f"backward {number} of {len(sums)}")
            (loss * world_size).backward()
        loss_here += float(loss.detach())
    return loss_here


@contextmanager
def synchronised(model: nn.Module, *, when: bool) -> Iterator[None]:
    """Reduce gradients in this backward, or keep them on the rank (no_sync)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(when)
        yield
        return
    no_sync = getattr(model, "no_sync", None)
    with nullcontext() if when or no_sync is None else no_sync():
        yield
