"""`shard_model`: cut a model with DoRA layers into FSDP units, the same units under every strategy.

Words. A *unit* is a set of parameters that is gathered and freed together, around one module's forward and backward.
A *flat parameter* (FSDP1) is a unit's members flattened and concatenated; a rank's *shard* is its part. *Resharding*
frees what was gathered. The *wire* is what collectives carry: its dtype may differ from the shards' (`param_dtype`),
but never for adapters or packed bytes.

The rule of the units (S7), named "base, bias, adapter, block, root". S2's layouts depend on it:

    unit               members                                               wire
    DoraLayer.base     the frozen weight, or its packed bytes                param_dtype if dense, else opaque (S6)
    DoraLayer.bias     the frozen bias, if any                               its own dtype
    DoraLayer          lora_A, lora_B, magnitude, in this order              float32, gradients as well (D11)
    a block            what is left of a ModuleList's member that holds      param_dtype
                       DoRA layers: its norms
    the model          what is left: embeddings, last norm, output head      param_dtype
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from torch_impl.config import REPLICATED, ShardConfig
from torch_impl.errors import ShardingError, StorageError
from torch_impl.layers import DoraLayer
from torch_impl.shards import is_sharded

Wrap = Callable[..., nn.Module]


def shard_model(model: nn.Module, config: ShardConfig) -> nn.Module:
    """Shard over the default process group, on the device the parameters are on.

    Args:
        model: what `apply_dora` returned; its modules are wrapped or changed in place.
        config: strategy and wire dtypes.

    Returns:
        The model to run from now on (under fsdp1 a wrapper; build the optimizer from *its* parameters).

    Raises:
        ShardingError: no process group, no DoRA layer, sharded already, or a unit that the strategy can't hold (S7).
        StorageError: `param_dtype` against `quant_storage`, or integer storage in a flat parameter (S6, S7).
    """
    if config.strategy == "none":
        return model
    _refuse(model, config)
    if config.strategy == "ddp":
        return DistributedDataParallel(model)
    wrap = _fully_shard(model, config) if config.strategy in ("fsdp2", "hsdp") else _flat_wrap(model, config)
    # Inner units first: a unit takes whatever parameters no earlier unit has taken.
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DoraLayer)]
    # 1. Bases and biases, so that frozen members (and other dtypes) never share a unit with the adapter.
    for name, layer in layers:
        wire = config.param_dtype if layer.base.storage is None else None
        _replace(model, f"{name}.base", wrap, param_dtype=wire, cast_inputs=False)
        if layer.bias is not None:
            _replace(model, f"{name}.bias", wrap, param_dtype=None, cast_inputs=False)
    # 2. Adapters, with no policy at all: float32 on the wire both ways.
    for name, _ in layers:
        _replace(model, name, wrap, param_dtype=None, cast_inputs=False)
    # 3. Blocks, so that no more than one block's norms are gathered at a time; 4. the rest, in the root.
    for name in _block_names(model):
        _replace(model, name, wrap, param_dtype=config.param_dtype, cast_inputs=True)
    # A root with no parameters of its own computes nothing, so it has nothing to cast its inputs for.
    owns = any(True for _ in _left(model))
    return wrap(model, param_dtype=config.param_dtype if owns else None, cast_inputs=owns)


def _replace(model: nn.Module, name: str, wrap: Wrap, **policy: object) -> None:
    """Wrap one submodule where it stands."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner.register_module(leaf, wrap(owner.get_submodule(leaf), **policy))


def _fully_shard(model: nn.Module, config: ShardConfig) -> Wrap:
    """FSDP2: each parameter is cut along dim 0 (S1); `hsdp` does so within rows of a mesh, and averages across (S9)."""
    mesh = _mesh("cuda" if config.cpu_offload else _device(model).type, config)  # what is offloaded computes there

    def wrap(module: nn.Module, *, param_dtype: torch.dtype | None, cast_inputs: bool) -> nn.Module:
        reduce_dtype = config.reduce_dtype if cast_inputs else None
        policy = MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=cast_inputs
        )
        offload = {"offload_policy": CPUOffloadPolicy()} if config.cpu_offload else {}
        # torch's own default cuts again all units but the root, which the backward needs first
        again = None if config.reshard_after_forward else False
        return cast(
            "nn.Module", fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=again, **offload)
        )

    return wrap


def shard_size(config: ShardConfig, *, world_size: int) -> int:
    """How many ranks share one copy of the parameters under `config`: 1 where nothing is cut.

    Raises:
        ShardingError: replicas with a shard size that doesn't divide the world.
    """
    if config.strategy in ("ddp", "none"):
        return 1
    if config.strategy not in REPLICATED:
        return world_size
    size = config.shard_size or (world_size // 2 if world_size % 2 == 0 else world_size)
    if world_size % size:
        raise ShardingError(
            f"shard_size {size} doesn't divide the world of {world_size}", hint="use a divisor of the world size"
        )
    return size


def _mesh(device: str, config: ShardConfig) -> DeviceMesh:
    """All ranks in one row; for `hsdp` replicas of rows."""
    world_size = distributed.get_world_size()
    if config.strategy not in REPLICATED:
        return init_device_mesh(device, (world_size,))
    size = shard_size(config, world_size=world_size)
    return _rows(device, (world_size // size, size), distributed.group.WORLD)


@functools.lru_cache
def _rows(device: str, shape: tuple[int, int], _group: object) -> DeviceMesh:
    """Replicas of rows, made once in a process group: each mesh makes groups, with threads that nothing ends."""
    return init_device_mesh(device, shape, mesh_dim_names=("replica", "shard"))


def _flat_wrap(model: nn.Module, config: ShardConfig) -> Wrap:
    """FSDP1: each unit is one flat parameter, cut into equal ranges (S2)."""
    device = _device(model)
    original = config.strategy == "fsdp1-orig"
    mesh = _mesh(device.type, config) if config.strategy in REPLICATED else None
    cut = _CUTS[mesh is not None, config.reshard_after_forward]

    def wrap(module: nn.Module, *, param_dtype: torch.dtype | None, cast_inputs: bool) -> nn.Module:
        _refuse_mixed(module, original=original)
        reduce_dtype = config.reduce_dtype if cast_inputs else None
        policy = MixedPrecision(
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            cast_forward_inputs=cast_inputs,
            cast_root_forward_inputs=cast_inputs,
        )
        unset = param_dtype is None and reduce_dtype is None
        with warnings.catch_warnings():
            # at world size 1 torch turns every strategy into NO_SHARD and says so for each unit
            warnings.filterwarnings("ignore", message="FSDP is switching to use `NO_SHARD`")
            return FullyShardedDataParallel(
                module,
                device_id=device,
                use_orig_params=original,
                mixed_precision=None if unset else policy,
                sharding_strategy=cut,
                device_mesh=mesh,
            )

    return wrap


_CUTS = {
    (False, True): ShardingStrategy.FULL_SHARD,
    (False, False): ShardingStrategy.SHARD_GRAD_OP,
    (True, True): ShardingStrategy.HYBRID_SHARD,
    (True, False): ShardingStrategy._HYBRID_SHARD_ZERO2,  # noqa: SLF001 - the only name that torch gives it
}
"""By (replicas, reshard after forward): what torch calls it."""


def _block_names(model: nn.Module) -> Iterator[str]:
    """Members of module lists that hold DoRA layers and parameters of no other unit, innermost first."""
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        names += [
            f"{name}.{index}".lstrip(".")
            for index, block in enumerate(module)
            if not _is_unit(block)
            and any(isinstance(m, DoraLayer) for m in block.modules())
            and any(True for _ in _left(block))
        ]
    return reversed(names)


def _is_unit(module: nn.Module) -> bool:
    """Whether a strategy has taken this module's parameters already."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def _left(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters below `module` that belong to no inner unit, with their names."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if not _is_unit(child):
            yield from ((f"{name}.{rest}", parameter) for rest, parameter in _left(child))


def _device(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device


def _refuse(model: nn.Module, config: ShardConfig) -> None:
    """What can't be sharded is refused before anything is wrapped."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ShardingError("there is no process group", hint="call torch.distributed.init_process_group first")
    if is_sharded(model):
        raise ShardingError("the model is sharded already", hint="call shard_model once")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DoraLayer)]
    if not layers:
        raise ShardingError("the model has no DoRA layer", hint="call apply_dora first")
    for name, layer in layers:
        _refuse_storage(name, layer, config)


def _refuse_storage(name: str, layer: DoraLayer, config: ShardConfig) -> None:
    """S6, D6: the wire may change neither packed bytes nor the weight that the magnitude was made from."""
    storage, param_dtype = layer.base.storage, config.param_dtype
    if storage is None:
        if param_dtype not in (None, layer.base.dtype, layer.compute_dtype):
            raise ShardingError(
                f"param_dtype {param_dtype} would change {name}.base.weight, computed in {layer.compute_dtype}",
                hint=f"use DoraConfig(compute_dtype={param_dtype}): m starts from the weight that is used (D6)",
            )
        return
    if storage.is_floating_point and param_dtype not in (None, storage):
        raise StorageError(
            f"param_dtype {param_dtype} against quant_storage {storage} of {name}.base.weight (S6)",
            hint=f"use QuantConfig(quant_storage={param_dtype}), or leave param_dtype unset",
        )
    if not storage.is_floating_point and config.strategy.startswith("fsdp1"):
        raise StorageError(
            f"{config.strategy} can't hold {storage} bytes of {name}.base.weight in a flat parameter (S7)",
            hint="use QuantConfig(quant_storage=torch.bfloat16), or fsdp2",
        )


def _refuse_mixed(module: nn.Module, *, original: bool) -> None:
    """S7: a flat parameter has one dtype, and without `use_orig_params` one `requires_grad`."""
    members = list(_left(module))
    for what, seen in (
        ("dtype", {p.dtype for _, p in members}),
        ("requires_grad", set() if original else {p.requires_grad for _, p in members}),
    ):
        if len(seen) > 1:
            names = ", ".join(name for name, _ in members[:4])
            raise ShardingError(
                f"{names} would share a flat parameter but differ in {what}: {seen}",
                hint="make them agree, or use fsdp2",
            )
