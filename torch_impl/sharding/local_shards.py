"""`local_shards`: what this rank holds of every parameter, gradient and optimizer state, with its place in the whole.

Clauses: S1 (fsdp2: slices along dim 0), S2 (fsdp1: one range of the row-major flattening), S7, S10.

The only file that reads private attributes of torch. They are, all of FSDP1's:

    FullyShardedDataParallel._handle   the life cycle of the unit's flat parameter; None for a unit without parameters
    handle._use_orig_params            whether members keep parameter objects of their own
    handle.flat_param, .sharded_grad   this rank's shard of the unit, and of its gradient
    flat_param._fqns, ._shapes         each member's name below its unit, and its whole shape
    flat_param._shard_param_infos      where a member lies in this rank's shard, and which range of the member that is
    flat_param._params                 with use_orig_params: the members' own parameters, views of the shard
"""
# ruff: noqa: SLF001 - the one file that looks into torch; its docstring lists what it reads

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from torch_impl.sharding.meshes import TENSOR
from torch_impl.wrappers import unwrapped_name, without_ddp


@dataclass(frozen=True)
class LocalShard:
    """A rank's part of one tensor."""

    name: str
    """The parameter's name in the unwrapped model."""
    kind: str
    """`parameter`, `gradient` or `optimizer:NAME`."""
    global_shape: tuple[int, ...]
    """The whole parameter's shape."""
    index: tuple[slice, ...]
    """Slices into the global shape; or one slice into its row-major flattening, for part of a flat parameter."""
    tensor: Tensor
    """What the rank holds, detached; it may be empty."""
    copies: int = 1
    """S10: how many tensor ranks hold the same part."""


@dataclass(frozen=True)
class _Place:
    """A parameter's part on this rank, before its kinds are told apart."""

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    owner: nn.Parameter  # what the optimizer was given
    cut: slice | None  # the range of the flattened owner that is this parameter's; None where it isn't flattened
    unit_gradient: bool  # whether an empty part belongs to a unit that has gradients


def local_shards(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[LocalShard]:
    """Yield this rank's shards: each parameter (frozen ones too), its gradient where there is one, its optimizer state.

    Args:
        model: sharded by any strategy, or not at all.
        optimizer: one built from the sharded model's parameters; its tensors of the parameter's size are yielded too.

    Yields:
        Shards in the order of the model's modules; empty ones as well. Tensors share the model's memory: copy what must
        last.
    """
    for place in _places(model):
        yield _shard(place, "parameter", place.owner.detach())
        gradient = place.owner.grad
        if gradient is not None:
            yield _shard(place, "gradient", gradient)
        elif place.unit_gradient:
            yield _shard(place, "gradient", place.owner.detach())
        for key, value in _state(optimizer, place.owner).items():
            yield _shard(place, f"optimizer:{key}", value)


def gathered(shard: LocalShard) -> Tensor:
    """The whole of a float32 tensor, bit for bit, on every rank; a collective of all.

    Each rank puts its part into zeros, and the bits' maximum is taken as integers: unsigned, they are at least 0, and
    copies of one part (S9, S10) agree, where a sum would count them twice.
    """
    whole = torch.zeros(shard.global_shape, dtype=torch.float32, device=shard.tensor.device)
    flat = len(shard.index) == 1
    (whole.view(-1) if flat else whole)[shard.index[0] if flat else shard.index] = shard.tensor
    bits = whole.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    distributed.all_reduce(bits, op=distributed.ReduceOp.MAX)
    return bits.to(torch.int32).view(torch.float32)


def _shard(place: _Place, kind: str, tensor: Tensor) -> LocalShard:
    """The part of `tensor` that `place` names."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    part = local.detach() if place.cut is None else local.detach().reshape(-1)[place.cut]
    return LocalShard(place.name, kind, place.shape, place.index, part, _copies(place.owner))


def _state(optimizer: torch.optim.Optimizer | None, owner: nn.Parameter) -> dict[str, Tensor]:
    """The owner's optimizer tensors that have its shape (not step counts)."""
    if optimizer is None or owner not in optimizer.state:
        return {}
    state = optimizer.state[owner]
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == owner.shape}


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every parameter's place, whatever the strategy."""
    model = without_ddp(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        yield from _flat_places(model)
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward the root still holds whole parameters
    for name, parameter in model.named_parameters():
        yield _Place(name, tuple(parameter.shape), _index(parameter), parameter, cut=None, unit_gradient=False)


def _index(parameter: nn.Parameter) -> tuple[slice, ...]:
    """S1: dim 0 in ranges of ceil(d0 / world), later ranks short or empty; whole where it isn't sharded.

    S10: what a tensor rank has is cut out first.
    """
    ranges = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        axes = range(mesh.ndim)
        for axis in sorted(axes, key=lambda axis: (mesh.mesh_dim_names or ())[axis : axis + 1] != (TENSOR,)):
            dim = getattr(parameter.placements[axis], "dim", None)  # replicas have none
            if dim is not None:
                start, stop = ranges[dim]
                width = -(-(stop - start) // mesh.size(axis))
                first = min(start + mesh.get_local_rank(axis) * width, stop)
                ranges[dim] = first, min(first + width, stop)
    return tuple(slice(*pair) for pair in ranges)


def _copies(parameter: nn.Parameter) -> int:
    """S10: tensor ranks that hold the same part; 1 where there are none."""
    if not isinstance(parameter, DTensor) or TENSOR not in (parameter.device_mesh.mesh_dim_names or ()):
        return 1
    axis = (parameter.device_mesh.mesh_dim_names or ()).index(TENSOR)
    return parameter.device_mesh.size(axis) if parameter.placements[axis].is_replicate() else 1


def _flat_places(model: nn.Module) -> Iterator[_Place]:
    """S2, read from torch's own metadata: each member's range of this rank's shard; and what no unit holds, whole."""
    in_units: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None:
            continue
        flat = handle.flat_param
        members: Any = flat._params if handle._use_orig_params else [flat] * len(flat._fqns)
        in_units |= {flat, *members}
        held = [member for member in members if member.numel()]
        has_gradient = any(m.grad is not None for m in held) or (not held and handle.sharded_grad is not None)
        for position, owner in enumerate(members):
            start, stop, cut = _ranges(flat._shard_param_infos[position])
            yield _Place(
                name=unwrapped_name(f"{prefix}.{flat._fqns[position]}"),
                shape=tuple(flat._shapes[position]),
                index=(slice(start, stop),),
                owner=owner,
                # whole (not even flat) at world size 1, where torch doesn't shard
                cut=slice(None) if handle._use_orig_params else cut,
                unit_gradient=has_gradient and start == stop,
            )
    for name, parameter in model.named_parameters():
        if parameter not in in_units:
            shape = tuple(parameter.shape)
            whole = tuple(slice(0, size) for size in shape)
            yield _Place(unwrapped_name(name), shape, whole, parameter, cut=None, unit_gradient=False)


def _ranges(info: Any) -> tuple[int, int, slice]:
    """A member's range in itself (half open), and the range of the shard that holds it."""
    if not info.in_shard:
        return 0, 0, slice(0, 0)
    start, offset, size = info.intra_param_start_idx, info.offset_in_shard, info.numel_in_shard
    return start, start + size, slice(offset, offset + size)
