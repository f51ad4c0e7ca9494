"""Meshes of ranks: one row, replicas of rows (S9), or rows of tensor ranks (S10)."""

import functools

from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_impl.config import ShardConfig
from torch_impl.errors import ShardingError

DATA, TENSOR = "data", "tensor"
"""The dimensions of a mesh with tensor ranks: those that see unlike batches, and those that share features."""


def shard_size(config: ShardConfig, *, world_size: int) -> int:
    """How many ranks share one copy of the parameters under `config`: 1 where nothing is cut.

    Raises:
        ShardingError: replicas with a shard size that doesn't divide the world.
    """
    tensor = tensor_size(config, world_size=world_size)
    if not config.how.cuts:
        return 1
    if not config.how.hybrid:
        return world_size // tensor
    size = config.shard_size or (world_size // 2 if world_size % 2 == 0 else world_size)
    if world_size % size:
        raise ShardingError(
            f"shard_size {size} doesn't divide the world of {world_size}", hint="use a divisor of the world size"
        )
    return size


def tensor_size(config: ShardConfig, *, world_size: int) -> int:
    """How many ranks share each layer's features and see the same batch (S10): 1 but under `tp` and `fsdp2-tp`.

    Raises:
        ShardingError: a tensor size that doesn't divide the world.
    """
    if not config.how.tensor:
        return 1
    size = config.tensor_size or world_size
    if world_size % size or not (config.how.cuts or size == world_size):
        raise ShardingError(
            f"tensor_size {size} for {config.strategy} in a world of {world_size}",
            hint="use a divisor of the world size" if config.how.cuts else "leave it out, or use fsdp2-tp",
        )
    return size


def rank_mesh(device: str, config: ShardConfig) -> DeviceMesh:
    """All ranks in one row; for `hsdp` replicas of rows, for `tp` and `fsdp2-tp` rows of tensor ranks."""
    world_size = distributed.get_world_size()
    if config.how.tensor:
        size = tensor_size(config, world_size=world_size)
        return _rows(device, (world_size // size, size), (DATA, TENSOR), distributed.group.WORLD)
    if not config.how.hybrid:
        return init_device_mesh(device, (world_size,))
    size = shard_size(config, world_size=world_size)
    return _rows(device, (world_size // size, size), ("replica", "shard"), distributed.group.WORLD)


@functools.lru_cache
def _rows(device: str, shape: tuple[int, int], names: tuple[str, str], _group: object) -> DeviceMesh:
    """A mesh, made once in a process group: each one makes groups, with threads that nothing ends."""
    return init_device_mesh(device, shape, mesh_dim_names=names)
