"""Run by ranks: optimizers made before and after a model is sharded."""

import torch
from onehot import Stack, build

from torch_impl import ShardConfig, local_shards
from torch_impl.errors import DoraError
from torch_impl.sharding.apply import shard_model


def steps(*, rank: int, world: int, strategy: str) -> tuple[str, bool, bool]:
    """What the step of an optimizer made too early says, and whether its and a later one's steps change the model."""
    del world
    model = build(Stack())
    early = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    model = shard_model(model, ShardConfig(strategy=strategy))
    late = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    torch.manual_seed(rank)
    model(torch.randn(4, 66)).sum().backward()
    begun = _held(model)
    said = ""
    try:
        early.step()
    except DoraError as error:
        said = str(error)
    moved = _held(model) != begun
    late.step()
    return said, moved, _held(model) != begun


def _held(model: torch.nn.Module) -> list[list[float]]:
    return [shard.tensor.flatten().tolist() for shard in local_shards(model) if shard.kind == "parameter"]
