"""What a rank holds of any torch module, and where it lies in the unsharded tensor: read from torch's own records.

Third parties' shards are read here, so that nothing under test says where its own shards lie. This project's
implementation gives its own, `torch_impl.local_shards`, which users rely on and which is therefore under test itself.

Clauses: S1 (DTensor: what its placements say), S2 (FSDP1: one range of each member's row-major flattening).
"""
# ruff: noqa: SLF001 - FSDP1 keeps in private attributes where the members of a flat parameter lie

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parity.shard import Index, whole_index

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Words that FSDP1, activation checkpointing and `torch.compile` put into names."""


@dataclass(frozen=True)
class Held:
    """A rank's part of one tensor; `torch_impl.LocalShard` has the same fields."""

    name: str
    """The parameter's name in the unwrapped model."""
    kind: str
    """`parameter`, `gradient` or `optimizer:NAME`."""
    global_shape: tuple[int, ...]
    """The whole parameter's shape."""
    index: Index
    """Slices into the global shape; or one slice into its row-major flattening."""
    tensor: Tensor
    """What lies here; it may be empty."""


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Held]:
    """Every parameter of the model, its gradient where there is one, and its tensors in the optimizer's state."""
    flat = [part for prefix, module in model.named_modules() for part in _held_flat(prefix, module, optimizer)]
    yield from flat
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a root stays gathered after a forward without a backward
    of_units = {part.name for part in flat}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, FlatParameter) or unwrapped(name) in of_units:
            continue
        index = _place(parameter)
        for kind, tensor in _tensors(parameter, optimizer):
            yield Held(unwrapped(name), kind, tuple(parameter.shape), index, _local(tensor))


def unwrapped(name: str) -> str:
    """The name without what wrappers add: FSDP1, DDP (`module.` in front), recomputation, compilation."""
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    return ".".join(words).removeprefix("module.")


def _tensors(owner: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of what belongs to a parameter and has its shape."""
    yield "parameter", owner.detach()
    if owner.grad is not None:
        yield "gradient", owner.grad
    state = optimizer.state.get(owner, {}) if optimizer else {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == owner.shape:
            yield f"optimizer:{key}", value


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _place(parameter: Tensor) -> Index:
    """S1: as torch places it, along whatever dimensions; whole where it is no DTensor."""
    if not isinstance(parameter, DTensor):
        return whole_index(tuple(parameter.shape))
    sizes, starts = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    starts = [min(start, whole) for start, whole in zip(starts, parameter.shape, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _held_flat(prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Held]:
    """S2: each member's range of this rank's shard of the unit; nothing where the module is none."""
    handle: Any = module._handle if isinstance(module, FullyShardedDataParallel) else None
    if handle is None:
        return
    flat = handle.flat_param
    owners = flat._params if handle._use_orig_params else [flat] * len(flat._fqns)
    unit_has_gradient = handle.sharded_grad is not None or any(owner.grad is not None for owner in owners)
    for fqn, shape, info, owner in zip(flat._fqns, flat._shapes, flat._shard_param_infos, owners, strict=True):
        start, offset, size = (
            (info.intra_param_start_idx, info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0, 0)
        )
        name, index = unwrapped(f"{prefix}.{fqn}".lstrip(".")), (slice(start, start + size),)
        part = slice(None) if handle._use_orig_params else slice(offset, offset + size)
        kinds = dict(_tensors(owner, optimizer))
        if not size and unit_has_gradient:
            kinds.setdefault("gradient", owner.detach())  # nothing lies here; the unit has gradients all the same
        for kind, tensor in kinds.items():
            lies_here = tensor.reshape(-1)[part] if size else tensor.reshape(-1)[:0]
            yield Held(name, kind, tuple(shape), index, lies_here.detach())
