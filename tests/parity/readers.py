"""Implementations whose shards parity reads itself, from torch's records. Ranks import them."""

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard

from parity.implementations.torch_dora import TorchDora
from parity.implementations.torch_stack import TorchStack


class ReadByParity(TorchDora):
    """`torch_impl`, which has no say in what its ranks hold."""

    holds = TorchStack.holds


class Layer(torch.nn.Module):
    """A plain DoRA layer of somebody else's making."""

    def __init__(self, weight, lora_A, lora_B, magnitude, *, scaling):
        super().__init__()
        self.weight, self.scaling = weight, scaling
        self.lora_A, self.lora_B, self.magnitude = map(torch.nn.Parameter, (lora_A, lora_B, magnitude))

    def forward(self, x):
        """Give y."""
        V = self.weight + self.scaling * self.lora_B @ self.lora_A
        norm = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64).to(V.dtype).detach()
        return self.magnitude / norm * (x @ V.T)


class ByColumns(TorchStack):
    """Cuts matrices along their second dimension, which no layout of S1 has."""

    strategies = ("none", "fsdp2")

    def layer(self, case, arrays):
        """One layer."""
        return Layer(**arrays, scaling=case.scaling)

    def shard(self, model, case):  # noqa: ARG002 - the hook's form
        """A unit a layer."""
        for layer in model.layers:
            fully_shard(layer, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
        return fully_shard(model)


class Ignoring(ByColumns):
    """Leaves the magnitudes out of FSDP1's units: each rank has its own gradient of them."""

    strategies = ("none", "fsdp1")

    def shard(self, model, case):  # noqa: ARG002 - the hook's form
        """One unit; FSDP refuses nothing."""
        ignored = [layer.magnitude for layer in model.layers]
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), ignored_states=ignored)


class Misread(ByColumns):
    """Says that it cuts rows."""

    def holds(self, model, optimizer=None):
        """The right parts at the wrong places."""
        for part in super().holds(model, optimizer):
            yield part if part.tensor.dim() == 1 else _turned(part)


def _turned(part):
    rows, columns = part.index
    place = (slice(0, rows.stop), columns) if columns.start == 0 else (rows, slice(0, columns.stop - columns.start))
    return type(part)(part.name, part.kind, part.global_shape, place, part.tensor)
