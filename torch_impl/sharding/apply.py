"""`shard_model`: cut a model with DoRA layers into FSDP units, the same units under every strategy.

Words. A *unit* is a set of parameters that is gathered and freed together, around one module's forward and backward.
A *flat parameter* (FSDP1) is a unit's members flattened and concatenated; a rank's *shard* is its part. *Resharding*
frees what was gathered. The *wire* is what collectives carry: its dtype may differ from the shards' (`param_dtype`),
but never for adapters or packed bytes.

The rule of the units (S7). A *block* is a member of a ModuleList that holds DoRA layers; a DoRA layer in no such member
is a block by itself. With `units="block"`, as `fsdp2` and `hsdp` have it unless told otherwise:

    unit               members                                               wire
    a block, cast      frozen dense weights and norms of another dtype       param_dtype
                       than param_dtype, where that is set
    a block            all else of it: bases, biases, adapters, norms        each its own dtype; adapters and their
                                                                             gradients float32 (D11), bytes opaque (S6)
    the model          what is left: embeddings, last norm, output head      param_dtype

FSDP2's collectives carry several dtypes at once. FSDP1's flat parameters have one dtype, and one that is trained and
frozen in parts has gradients for all of it: there a block is one unit for each dtype of what is frozen, and one for
what trains, each around the next.

`units="layer"` cuts finer, for blocks that don't fit. It is FSDP1's default. S2's layouts depend on it:

    DoraLayer.base     the frozen weight, or its packed bytes                param_dtype if dense, else opaque (S6)
    DoraLayer.bias     the frozen bias, if any                               its own dtype
    DoraLayer          lora_A, lora_B, magnitude, in this order              float32, gradients as well (D11)
    a block            what is left of it: its norms                         param_dtype
    the model          what is left: embeddings, last norm, output head      param_dtype
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
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
from torch.utils._pytree import tree_map_only

from torch_impl.config import ShardConfig
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.products import agree
from torch_impl.sharding.alike import refuse_unlike, start_alike
from torch_impl.sharding.meshes import DATA, TENSOR, rank_mesh
from torch_impl.sharding.shardable import refuse_unshardable
from torch_impl.sharding.stale import trained, watch_replaced
from torch_impl.sharding.tensor_parallel import cut_tensors
from torch_impl.sharding.units import Unit, block_names, plan_units
from torch_impl.wrappers import WRAPPER

Wrap = Callable[..., nn.Module]


def shard_model(model: nn.Module, config: ShardConfig) -> nn.Module:
    """Shard over the default process group, on the device the parameters are on.

    Args:
        model: what `apply_dora` returned; its modules are wrapped or changed in place.
        config: strategy and wire dtypes.

    Returns:
        The model to run from now on (under fsdp1 a wrapper; build the optimizer from *its* parameters).

    Raises:
        ShardingError: no process group, no DoRA layer, sharded already, a unit that the strategy can't hold (S7), or a
            frozen weight that is another on some rank.
        StorageError: `param_dtype` against `quant_storage`, or integer storage in a flat parameter (S6, S7).
    """
    if config.how.alone:
        return model
    refuse_unshardable(model, config)
    device = torch.device("cuda") if config.cpu_offload else _device(model)
    agree(device)
    if config.how.replicates and not config.how.cuts:
        return DistributedDataParallel(model)
    refuse_unlike(model, device)
    start_alike(model, device)
    before = trained(model)
    if config.how.tensor:
        mesh = rank_mesh(device.type, config)
        cut_tensors(model, config, mesh[TENSOR])
    if not config.how.cuts:
        watch_replaced(before, model)
        return model
    plan = plan_units(model, config).units
    flat = config.how.flat
    wrap = _flat_wrap(model, config) if flat else _fully_shard(model, config)
    # Inner units first: a unit takes whatever parameters no earlier unit has taken.
    if config.unit_rule == "layer":
        _wrap_layers(model, wrap, config)
    else:
        _wrap_blocks(model, wrap, config, plan)
    # A root with no parameters of its own computes nothing, so it has nothing to cast its inputs for.
    owns = any(True for _ in _left(model))
    sharded = wrap(model, param_dtype=config.param_dtype if owns else None, cast_inputs=owns)
    if config.unit_rule == "block" and isinstance(sharded, FSDPModule):
        _prefetch(sharded)
    watch_replaced(before, sharded)
    return sharded


def _prefetch(model: FSDPModule) -> None:
    """Each block of a list asks for the next one before it computes, forwards and backwards.

    What was asked for and not used is dropped at the end of the backward pass, by torch. On a CPU a gather is otherwise
    waited for where it is asked for.
    """
    for blocks in cast("nn.Module", model).modules():
        if isinstance(blocks, nn.ModuleList):
            for block, following in itertools.pairwise(blocks):
                if isinstance(block, FSDPModule) and isinstance(following, FSDPModule):
                    block.set_modules_to_forward_prefetch([following])
                    following.set_modules_to_backward_prefetch([block])
    if _device(cast("nn.Module", model)).type == "cpu":
        model._set_unshard_async_op(True)  # noqa: SLF001 - torch gives it no other name


def _wrap_blocks(model: nn.Module, wrap: Wrap, config: ShardConfig, plan: tuple[Unit, ...]) -> None:
    """S7, `units="block"`: no policy reaches an adapter or packed bytes, since what is to be cast has its own unit."""
    for name in block_names(model, _layers(model)):
        units = [unit for unit in plan if unit.name == name]
        block = model.get_submodule(name)
        if config.param_dtype is not None and any(m.kind == "other" for unit in units for m in unit.members):
            block.register_forward_pre_hook(_casting(config.param_dtype), with_kwargs=True)
        if config.how.flat:
            _wrap_flat_block(model, name, wrap, units)
            continue
        for unit in units:
            owners = dict.fromkeys(m.name.rpartition(".")[0] for m in unit.members)
            what = [model.get_submodule(owner) for owner in owners] if unit.rule == "cast" else block
            wrap(what, param_dtype=unit.wire, cast_inputs=False)


def _wrap_flat_block(model: nn.Module, name: str, wrap: Wrap, units: list[Unit]) -> None:
    """FSDP1: the block's units around each other, the first outermost; each ignores what the later ones are to take."""
    parameters = dict(model.named_parameters())
    block = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    holder, place = model.get_submodule(parent), leaf
    for position, unit in enumerate(units):
        later = [parameters[m.name] for other in units[position + 1 :] for m in other.members]
        wrapped = wrap(block, param_dtype=unit.wire, cast_inputs=False, ignored=later)
        holder.register_module(place, wrapped)
        holder, place = wrapped, WRAPPER


def _casting(dtype: torch.dtype) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that casts a block's floating inputs, as FSDP does where a unit has a `param_dtype`."""

    def cast_inputs(_: nn.Module, inputs: Any, named: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (inputs, named))

    return cast_inputs


def _wrap_layers(model: nn.Module, wrap: Wrap, config: ShardConfig) -> None:
    """S7, `units="layer"`: frozen members never share a unit with the adapter, nor one dtype with another."""
    layers = _layers(model)
    # 1. Bases and biases, so that frozen members (and other dtypes) never share a unit with the adapter.
    for name, layer in layers.items():
        wire = config.param_dtype if layer.base.storage is None else None
        _replace(model, f"{name}.base", wrap, param_dtype=wire, cast_inputs=False)
        if layer.bias is not None:
            _replace(model, f"{name}.bias", wrap, param_dtype=None, cast_inputs=False)
    # 2. Adapters, with no policy at all: float32 on the wire both ways.
    for name in layers:
        _replace(model, name, wrap, param_dtype=None, cast_inputs=False)
    # 3. Blocks, so that no more than one block's norms are gathered at a time.
    for name in block_names(model, layers):
        if not _is_unit(block := model.get_submodule(name)) and any(True for _ in _left(block)):
            _replace(model, name, wrap, param_dtype=config.param_dtype, cast_inputs=True)


def _replace(model: nn.Module, name: str, wrap: Wrap, **policy: object) -> None:
    """Wrap one submodule where it stands."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner.register_module(leaf, wrap(owner.get_submodule(leaf), **policy))


def _fully_shard(model: nn.Module, config: ShardConfig) -> Wrap:
    """FSDP2: each parameter is cut along dim 0 (S1), or what tensor ranks leave of it (S10).

    `hsdp` does so within rows of a mesh, and averages across (S9).
    """
    mesh = rank_mesh("cuda" if config.cpu_offload else _device(model).type, config)  # what is offloaded computes there
    mesh = mesh[DATA] if config.how.tensor else mesh
    whole = _scalars(model)

    def wrap(module: Any, *, param_dtype: torch.dtype | None, cast_inputs: bool) -> nn.Module:
        """A module, or several that make one unit."""
        reduce_dtype = config.reduce_dtype if cast_inputs else None
        policy = MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=cast_inputs
        )
        offload = {"offload_policy": CPUOffloadPolicy()} if config.cpu_offload else {}
        # torch's own default cuts again all units but the root, which the backward needs first
        again = None if config.reshard_after_forward else False
        return cast(
            "nn.Module",
            fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=again, ignored_params=whole, **offload
            ),
        )

    return wrap


def _flat_wrap(model: nn.Module, config: ShardConfig) -> Wrap:
    """FSDP1: each unit is one flat parameter, cut into equal ranges (S2)."""
    device = _device(model)
    original = config.how.keeps_originals
    mesh = rank_mesh(device.type, config) if config.how.hybrid else None
    cut = _CUTS[mesh is not None, config.reshard_after_forward]

    whole = _scalars(model)

    def wrap(
        module: nn.Module, *, param_dtype: torch.dtype | None, cast_inputs: bool, ignored: Iterable[nn.Parameter] = ()
    ) -> nn.Module:
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
                ignored_states=[*whole, *ignored] or None,
            )

    return wrap


_CUTS = {
    (False, True): ShardingStrategy.FULL_SHARD,
    (False, False): ShardingStrategy.SHARD_GRAD_OP,
    (True, True): ShardingStrategy.HYBRID_SHARD,
    (True, False): ShardingStrategy._HYBRID_SHARD_ZERO2,  # noqa: SLF001 - the only name that torch gives it
}
"""By (replicas, reshard after forward): what torch calls it."""


def _is_unit(module: nn.Module) -> bool:
    """Whether a strategy has taken this module's parameters already."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def _left(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters below `module` that belong to no inner unit, with their names."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if not _is_unit(child):
            yield from ((f"{name}.{rest}", parameter) for rest, parameter in _left(child))


def _layers(model: nn.Module) -> dict[str, DoraLayer]:
    """Its DoRA layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DoraLayer)}


def _scalars(model: nn.Module) -> set[nn.Parameter]:
    """Parameters without dimensions, which no strategy can cut: each rank keeps them whole."""
    return {parameter for parameter in model.parameters() if not parameter.shape}


def _device(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device
