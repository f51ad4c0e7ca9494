"""D12: a fresh adapter's output beside the plain layers', on every rank, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from parity.case import UNSHARDED, NeutralCase
from parity.implementations.observed import to_numpy, whole_shard
from parity.inputs import stack_inputs
from parity.job import Place
from parity.shard import Shard
from torch_impl import DoraLinear


def neutral_shards(
    case: NeutralCase, place: Place, build: Callable[[str], nn.Module], shard: Callable[[nn.Module], nn.Module]
) -> Iterator[Shard]:
    """B is 0 and the magnitude is the layer's own norm, so c is 1 (D12); every rank sees every token."""
    dtype = getattr(torch, case.compute)
    x = torch.from_numpy(stack_inputs(case)["x"].copy()).to(place.device, dtype)
    model = build(place.device)
    layers = [layer for layer in model.modules() if isinstance(layer, DoraLinear)]
    for layer in layers:
        layer.reset_magnitude()
    plain = _plain_output(layers, x, case)
    y = (model if case.strategy == UNSHARDED else shard(model))(x)
    yield whole_shard("y", "plain", 1, to_numpy(plain))
    yield whole_shard("y", "output", 1, to_numpy(y))


@torch.no_grad()
def _plain_output(layers: list[DoraLinear], x: Tensor, case: NeutralCase) -> Tensor:
    """Plain linear layers on the weights that the forward multiplies by (D6): no adapter takes part."""
    for position, layer in enumerate(layers):
        x = torch.relu(x) if position and case.activation == "relu" else x
        weight = layer.base.decode(layer.base.weight, dtype=x.dtype)
        y = x @ weight.T
        # D8: the bias is added in float32, as it is stored, and the sum is rounded once
        x = y if layer.bias is None else (y.float() + layer.bias()).to(y.dtype)
    return x
