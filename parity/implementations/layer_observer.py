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
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoraLayer)}
    counts: Counter[str] = Counter()
    for name, layer in layers.items():
        layer.base.register_forward_pre_hook(partial(_count, counts, name))
        if values:
            layer.base.register_forward_hook(partial(_keep, seen, name))

    def shards(step: int) -> Iterator[Shard]:
        for name, (ratio, norm) in seen.items():
            yield _rows_of(layers[name], name, "ratio", step, ratio)
            yield _rows_of(layers[name], name, "norm", step, norm)
        yield whole_shard("forwards", "setting", step, np.array(sorted(set(counts.values())), dtype=np.float64))
        counts.clear()

    return shards


def _rows_of(layer: DoraLayer, name: str, kind: str, step: int, values: Tensor) -> Shard:
    """What this rank's forward had: all rows, or of a column-parallel layer a tensor rank's (S10)."""
    count = values.numel()
    first = layer.cut.mesh.get_local_rank() * count if layer.cut is not None and count < layer.rows.out else 0
    return Shard(
        name=name,
        kind=kind,
        step=step,
        global_shape=(layer.rows.out,),
        index=(slice(first, first + count),),
        array=to_numpy(values),
    )


def _count(counts: Counter[str], name: str, *_: Any) -> None:
    counts[name] += 1


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, *hooked: Any) -> None:
    """Copy c and n of a forward that is differentiated; the last one of a step stays. Another product gives none."""
    saved: Any = getattr(getattr(hooked[-1], "grad_fn", None), "saved_tensors", ())
    if len(saved) > _NORM and saved[_NORM] is not None:
        seen[name] = (saved[_RATIO].clone(), saved[_NORM].clone())
