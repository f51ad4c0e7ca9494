"""The norm and the ratio of each DoRA layer, as its forward used them, and how often forwards were run.

Norms and ratios are read from what it saved for the backward pass: nothing is replaced or computed again, so what is
read is what gradients are made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from parity.implementations.observed import to_numpy, whole_shard
from parity.shard import Shard
from torch_impl.layers.dora import DoraLayer

_RATIO, _NORM = 3, 4
"""Where `RuleProduct` keeps c and n among its saved tensors; None where there is no magnitude."""


def layer_observer(model: nn.Module, *, values: bool) -> Callable[[int], Iterator[Shard]]:
    """Hook every layer's base, inside which all of the layer is computed (S8); ask after each step.

    Without `values` only forwards are counted: whoever computes them again in the backward pass (T5) runs each twice.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    counts: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLayer):
            layer.base.register_forward_pre_hook(partial(_count, counts, name))
            if values:
                layer.base.register_forward_hook(partial(_keep, seen, name))

    def shards(step: int) -> Iterator[Shard]:
        for name, (ratio, norm) in seen.items():
            yield whole_shard(name, "ratio", step, to_numpy(ratio))
            yield whole_shard(name, "norm", step, to_numpy(norm))
        yield whole_shard("forwards", "setting", step, np.array(sorted(set(counts.values())), dtype=np.float64))
        counts.clear()

    return shards


def _count(counts: Counter[str], name: str, *_: Any) -> None:
    counts[name] += 1


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, *hooked: Any) -> None:
    """Copy c and n of a forward that is differentiated; the last one of a step stays. Another product gives none."""
    saved: Any = getattr(getattr(hooked[-1], "grad_fn", None), "saved_tensors", ())
    if len(saved) > _NORM and saved[_NORM] is not None:
        seen[name] = (saved[_RATIO].clone(), saved[_NORM].clone())
