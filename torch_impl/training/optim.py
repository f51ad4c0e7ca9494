"""One optimizer step: the learning rate, the gradient's norm over all shards, clipping, and what must stop a run.

Clauses: S5 (one norm over all shards of all ranks), T2 (min(1, c / (N + 1e-6))), T3.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from torch_impl.errors import TrainingStoppedError
from torch_impl.sharding.local_shards import LocalShard, local_shards

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
_MOMENTUM = 0.9


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, schedule: Literal["cosine", "constant"]) -> float:
    """The rate of a step counted from 0: linear up to `peak` in `warmup` steps, then constant, or cosine towards 0.

    Args:
        step: the step, from 0.
        peak: the largest rate.
        steps: of the whole run; cosine would reach 0 at this one.
        warmup: steps before the peak.
        schedule: what follows.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(
    model: nn.Module, name: Literal["adamw", "sgd"], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum over the trainable parameters; not fused, whose bits depend on an element's place."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=_MOMENTUM, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def reduced(values: Iterable[float], *, device: torch.device) -> list[float]:
    """Sums over all ranks, in float64."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def gradients(model: nn.Module) -> list[LocalShard]:
    """This rank's shards of all gradients, empty ones left out."""
    return [shard for shard in local_shards(model) if shard.kind == "gradient" and shard.tensor.numel()]


def squared_norm(shards: Iterable[LocalShard]) -> float:
    """The sum of squares of this rank's gradients, in float64; of what several tensor ranks hold (S10) its share."""
    return sum(float(shard.tensor.double().square().sum()) / shard.copies for shard in shards)


def gradient_norm(model: nn.Module, *, replicas: int = 1) -> float:
    """S5: the 2-norm over all shards of all ranks, each once; a collective.

    Args:
        model: sharded by any strategy, or on one rank.
        replicas: how many ranks hold each shard (S9).
    """
    squared = squared_norm(gradients(model)) / replicas
    (total,) = reduced((squared,), device=next(model.parameters()).device)
    return total**0.5


@torch.no_grad()
def clip(model: nn.Module, *, norm: float, limit: float) -> None:
    """T2: scale all gradients by min(1, limit / (norm + 1e-6)); a limit of 0 leaves them."""
    coefficient = min(1.0, limit / (norm + _CLIP_EPSILON)) if limit else 1.0
    if coefficient < 1.0:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.grad.mul_(coefficient)


def refuse_useless(model: nn.Module, *, step: int, loss: float, norm: float) -> None:
    """No step is made from NaN or infinity, nor from a loss of exactly 0 with no gradient.

    Raises:
        TrainingStoppedError: on every rank; names the step, and the parameters concerned on any rank.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        if loss == 0.0 and norm == 0.0:
            names = sorted({shard.name for shard in gradients(model)})
            raise TrainingStoppedError(
                f"step {step}: the loss is exactly 0.0 and the gradients of {_some(names)} are all zero",
                hint="the batch predicts nothing, or the model isn't connected to its loss",
            )
        return
    names = _non_finite(model)
    raise TrainingStoppedError(
        f"step {step}: the loss is {loss}, the gradient's norm {norm}; not finite: {_some(names) or 'the loss alone'}",
        hint="no update was made; lower --lr, or look at the batch",
    )


def _non_finite(model: nn.Module) -> list[str]:
    """The trainable parameters whose gradient isn't finite on some rank; a collective."""
    bad = {shard.name for shard in gradients(model) if not bool(torch.isfinite(shard.tensor).all())}
    names = sorted({s.name for s in local_shards(model) if s.kind == "parameter" and _trains(s.name)})
    device = next(model.parameters()).device
    flags = reduced((float(name in bad) for name in names), device=device)
    return [name for name, flag in zip(names, flags, strict=True) if flag]


def _trains(name: str) -> bool:
    """Whether this is one of an adapter's tensors."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B", "magnitude")


def _some(names: list[str]) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")  # noqa: PLR2004 - as above


def cross_entropy_sum(logits_SLV: Tensor, labels_SL: Tensor) -> Tensor:
    """The sum of the next tokens' cross entropies, in float32; 0, still connected, where no label counts."""
    return nn.functional.cross_entropy(
        logits_SLV.flatten(0, 1).float(), labels_SL.flatten(), ignore_index=-100, reduction="sum"
    )
