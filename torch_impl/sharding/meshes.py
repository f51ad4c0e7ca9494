"""Meshes of ranks: one row, or replicas of rows (S9)."""

import functools

from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_impl.config import ShardConfig
from torch_impl.errors import ShardingError


def shard_size(config: ShardConfig, *, world_size: int) -> int:
    """How many ranks share one copy of the parameters under `config`: 1 where nothing is cut.

    Raises:
        ShardingError: replicas with a shard size that doesn't divide the world.
    """
    if not config.how.cuts:
        return 1
    if not config.how.hybrid:
        return world_size
    size = config.shard_size or (world_size // 2 if world_size % 2 == 0 else world_size)
    if world_size % size:
        raise ShardingError(
            f"shard_size {size} doesn't divide the world of {world_size}", hint="use a divisor of the world size"
        )
    return size


def rank_mesh(device: str, config: ShardConfig) -> DeviceMesh:
    """All ranks in one row; for `hsdp` replicas of rows."""
    world_size = distributed.get_world_size()
    if not config.how.hybrid:
        return init_device_mesh(device, (world_size,))
    size = shard_size(config, world_size=world_size)
    return _rows(device, (world_size // size, size), distributed.group.WORLD)


@functools.lru_cache
def _rows(device: str, shape: tuple[int, int], _group: object) -> DeviceMesh:
    """Replicas of rows, made once in a process group: each mesh makes groups, with threads that nothing ends."""
    return init_device_mesh(device, shape, mesh_dim_names=("replica", "shard"))
