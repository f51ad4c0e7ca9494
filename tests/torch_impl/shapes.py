"""Run by ranks: what a rank really holds against what `plan_units` counts from the model before it is sharded."""

import copy

import llama
from torch.distributed.tensor import DTensor

from torch_impl import ShardConfig, shard_model
from torch_impl.costs import costs
from torch_impl.units import plan_units


def held(*, rank: int, world: int, strategy: str, kind: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bytes of parameters, bytes of buffers) in memory, and as counted; every rank compares rank 0's count."""
    model = llama.build(kind)
    shard = ShardConfig(strategy=strategy)
    counted = costs(plan_units(copy.deepcopy(model), shard), shard, world_size=world, size=world)
    model = shard_model(model, shard)
    local = [p.to_local() if isinstance(p, DTensor) else p.data for p in model.parameters()]
    kept = sum(p.numel() * p.dtype.itemsize for p in local)
    kept = kept if rank == 0 else counted.parameters
    buffers = sum(b.numel() * b.dtype.itemsize for b in model.buffers())
    return (kept, buffers), (counted.parameters, counted.buffers)
