"""What `shard_model` refuses, before anything is wrapped.

Clauses: D6, S6, S7, S10.
"""

from torch import distributed, nn

from torch_impl.config import ShardConfig
from torch_impl.errors import ShardingError, StorageError
from torch_impl.layers.dora import DoraLayer
from torch_impl.sharding.meshes import tensor_size
from torch_impl.sharding.tensor_parallel import refuse_uncuttable
from torch_impl.sharding.units import Unit, plan_units
from torch_impl.wrappers import is_compiled, is_sharded


def refuse_unshardable(model: nn.Module, config: ShardConfig) -> None:
    """Refuse what can't be sharded.

    Raises:
        ShardingError: no process group, no DoRA layer, sharded already, or a unit that the strategy can't hold (S7).
        StorageError: `param_dtype` against `quant_storage`, or integer storage in a flat parameter (S6, S7).
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ShardingError("there is no process group", hint="call torch.distributed.init_process_group first")
    if is_sharded(model):
        raise ShardingError("the model is sharded already", hint="call shard_model once")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoraLayer)}
    if not layers:
        raise ShardingError("the model has no DoRA layer", hint="call apply_dora first")
    for name, layer in layers.items():
        _refuse_storage(name, layer, config)
    _refuse_scalars(model)
    if is_compiled(model) and (config.how.flat or (config.how.cuts and config.unit_rule != "block")):
        raise ShardingError(
            f"{config.strategy} with units={config.unit_rule!r} gathers inside of blocks, which are compiled whole",
            hint="use fsdp2 or hsdp with units='block', or ddp, or leave compile_blocks out",
        )
    if config.how.tensor:
        if is_compiled(model):
            raise ShardingError(f"{config.strategy} talks inside of blocks, which are compiled whole", hint="use fsdp2")
        refuse_uncuttable(model, config, ranks=tensor_size(config, world_size=distributed.get_world_size()))
    for unit in plan_units(model, config).units if config.how.cuts else ():
        _refuse_mixed(unit, config)


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
    if not storage.is_floating_point and config.how.flat:
        raise StorageError(
            f"{config.strategy} can't hold {storage} bytes of {name}.base.weight in a flat parameter (S7)",
            hint="use QuantConfig(quant_storage=torch.bfloat16), or fsdp2",
        )


def _refuse_scalars(model: nn.Module) -> None:
    """S1: a parameter without dimensions can't be cut; one that is frozen stays whole instead."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.shape:
            raise ShardingError(
                f"{name} trains and has no dimension to cut", hint="freeze it, or give it the shape (1,)"
            )


def _refuse_mixed(unit: Unit, config: ShardConfig) -> None:
    """S7: a flat parameter has one dtype, and without `use_orig_params` one `requires_grad`; FSDP2 trains in one."""
    flat = config.how.flat
    members = [m for m in unit.members if m.shape and (flat or m.trainable)]
    both = flat and not config.how.keeps_originals
    for what, seen in (
        ("dtype", {m.dtype for m in members}),
        ("requires_grad", {m.trainable for m in members} if both else set()),
    ):
        if len(seen) > 1:
            names = ", ".join(m.name for m in members[:4])
            together = "share a flat parameter" if flat else "train in one unit"
            finer = "units='layer'" if config.unit_rule == "block" and unit.name else "fsdp2"
            raise ShardingError(
                f"{names} would {together} but differ in {what}: {seen}", hint=f"make them agree, or use {finer}"
            )
