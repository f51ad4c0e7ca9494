"""The norm and the ratio of each DoRA layer, as its forward used them: read from what it saved for the backward pass.

Nothing is replaced or computed again, so what is read is what gradients are made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from parity.implementations.observed import to_numpy, whole_shard
from parity.shard import Shard
from torch_impl.layers import DoraLayer

_RATIO, _NORM = 3, 4
"""Where `DoraProduct` and `RuleProduct` keep c and n among their saved tensors."""


def layer_observer(model: nn.Module) -> Callable[[int], Iterator[Shard]]:
    """Hook every layer's base, inside which all of the layer is computed (S8); ask after each step."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLayer):
            layer.base.register_forward_hook(partial(_keep, seen, name))

    def shards(step: int) -> Iterator[Shard]:
        for name, (ratio, norm) in seen.items():
            yield whole_shard(name, "ratio", step, to_numpy(ratio))
            yield whole_shard(name, "norm", step, to_numpy(norm))

    return shards


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, *hooked: Any) -> None:
    """Copy c and n of a forward that is differentiated; the last one of a step stays. Another product gives none."""
    saved: Any = getattr(getattr(hooked[-1], "grad_fn", None), "saved_tensors", ())
    if len(saved) > _NORM:
        seen[name] = (saved[_RATIO].clone(), saved[_NORM].clone())
