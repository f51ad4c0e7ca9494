"""The units a model would be cut into, from shapes alone: nothing is wrapped, gathered or even materialised.

Axes: O output features, I input features, R adapter rank.
Clauses: S1, S2 (what a rank holds of a unit), S7 (the rule of the units, as `torch_impl.sharding` applies it).

A *unit* is a set of parameters that is gathered and freed together. A model that has DoRA layers, or is planned to
have them, is cut by this package's rule: base, bias, adapter, block, root. Any other model (PEFT's, say) has no such
layers: its units are its blocks, the members of its module lists, and the root.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from torch_impl.config import DoraConfig, QuantConfig, ShardConfig
from torch_impl.inject import target_names
from torch_impl.kinds import rows_of
from torch_impl.layers import DoraLayer, PackedBase

Kind = Literal["weight", "packed", "bias", "adapter", "other"]
ALIGNMENT = 16
"""Bytes at whose multiples a flat parameter's members start under `use_orig_params` (S2)."""
NESTED_BLOCKSIZE = 256
"""Absmax that share one second absmax (Q6)."""


@dataclass(frozen=True)
class Member:
    """One parameter of a unit."""

    name: str
    """Its name in the unwrapped model."""
    shape: tuple[int, ...]
    """Its whole shape; packed bytes have (n, 1)."""
    dtype: torch.dtype
    """What it is stored in."""
    trainable: bool
    """Its `requires_grad`."""
    kind: Kind
    """What it is to a DoRA layer; `other` is anything else."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter, as stored."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and freed together."""

    name: str
    """The module around whose forward they are gathered; empty for the root."""
    rule: Literal["base", "bias", "adapter", "block", "root"]
    """Which line of the rule made it (S7)."""
    members: tuple[Member, ...]
    """In registration order, which S2's layout depends on."""
    wire: torch.dtype | None
    """What it is gathered as; None is as stored."""
    weight_shape: tuple[int, int] | None = None
    """(O, I) of a base; of any kind of layer, its rows and the numbers of one (D3)."""

    def wire_bytes(self) -> int:
        """Bytes of the whole unit as it is gathered."""
        return sum(m.numel * (self.wire or m.dtype).itemsize for m in self.members)


@dataclass(frozen=True)
class Plan:
    """A model's units, and what every rank holds whole."""

    units: tuple[Unit, ...]
    """Inner ones first, as they are wrapped."""
    buffer_bytes: int
    """Buffers, quant states among them (S6): whole on every rank."""
    tied: tuple[tuple[str, str], ...]
    """Pairs of names of one parameter that lie in different units."""
    total: int
    """Parameters of the model before anything is packed, adapters included."""
    trainable: int
    """Parameters that train."""


def plan_units(model: nn.Module, shard: ShardConfig, dora: DoraConfig | None = None) -> Plan:
    """Say what `shard_model` would gather together.

    Args:
        model: any model, on any device; it may hold DoRA layers already. It isn't changed.
        shard: the wire dtype.
        dora: adapters that are to be put on first; None where the model has what it is to have.

    Returns:
        The plan, from shapes alone.

    Raises:
        TargetError: `dora` matches nothing.
    """
    targets = set() if dora is None else {id(model.get_submodule(name)) for name in target_names(model, dora)}
    layers: list[Unit] = []
    taken: set[int] = set()
    buffer_bytes = total = 0
    for name, module in model.named_modules():
        if isinstance(module, DoraLayer):
            units, state, size = _live(name, module, shard), 0, module.rows.length * module.rows.out
        elif dora is not None and id(module) in targets and rows_of(module) is not None:
            units, state, size = _planned(name, module, dora, shard)
        else:
            continue
        layers += units
        buffer_bytes += state
        total += size + sum(m.numel for u in units for m in u.members if u.rule != "base")
        taken |= {id(parameter) for parameter in module.parameters()}
    rest, tied, more = _rest(model, taken, shard, layers=tuple(unit.name for unit in layers), frozen=dora is not None)
    units = (*layers, *rest)
    return Plan(
        units=units,
        buffer_bytes=buffer_bytes + sum(b.numel() * b.dtype.itemsize for b in model.buffers()),
        tied=tied,
        total=total + more,
        trainable=sum(m.numel for u in units for m in u.members if m.trainable),
    )


def _live(name: str, layer: DoraLayer, shard: ShardConfig) -> list[Unit]:
    """A DoRA layer's units as it is."""
    packed = isinstance(layer.base, PackedBase)
    weight = _member(f"{name}.base.weight", layer.base.weight, "packed" if packed else "weight")
    shape = (layer.rows.out, layer.rows.length)
    units = [Unit(f"{name}.base", "base", (weight,), None if packed else shard.param_dtype, shape)]
    if layer.bias is not None:
        units.append(Unit(f"{name}.bias", "bias", (_member(f"{name}.bias.value", layer.bias.value, "bias"),), None))
    adapter = [_member(f"{name}.{leaf}", p, "adapter") for leaf, p in layer.named_parameters(recurse=False)]
    return [*units, Unit(name, "adapter", tuple(adapter), None)]


def _planned(name: str, module: Any, dora: DoraConfig, shard: ShardConfig) -> tuple[list[Unit], int, int]:
    """The units that a layer would have, its quant state's bytes, and its weight's elements."""
    rows = rows_of(module)
    assert rows is not None  # noqa: S101 - the caller has asked
    weight, state = _planned_weight(f"{name}.base.weight", module.weight, dora.quant_config)
    wire = None if weight.kind == "packed" else shard.param_dtype
    units = [Unit(f"{name}.base", "base", (weight,), wire, (rows.out, rows.length))]
    if getattr(module, "bias", None) is not None:
        bias = Member(f"{name}.bias.value", (rows.out,), module.bias.dtype, trainable=False, kind="bias")
        units.append(Unit(f"{name}.bias", "bias", (bias,), None))
    shapes = rows.adapter_shapes(dora)
    adapter = [Member(f"{name}.{k}", s, torch.float32, trainable=True, kind="adapter") for k, s in shapes.items()]
    return [*units, Unit(name, "adapter", tuple(adapter), None)], state, rows.out * rows.length


def _planned_weight(name: str, weight: nn.Parameter, quant: QuantConfig | None) -> tuple[Member, int]:
    """The frozen weight as it would be stored (Q1, Q3), and the bytes of its quant state (Q6)."""
    shape = tuple(weight.shape)
    if quant is None:
        return Member(name, shape, weight.dtype, trainable=False, kind="weight"), 0
    numel = math.prod(shape)
    items = math.ceil(math.ceil(numel / 2) / quant.quant_storage.itemsize)
    blocks = -(-numel // quant.blocksize)
    state = 4 * 16 + 4 * blocks
    if quant.nested:
        state = 4 * 16 + blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 * 256 + 4
    return Member(name, (items, 1), quant.quant_storage, trainable=False, kind="packed"), state


def _member(name: str, parameter: nn.Parameter, kind: Kind, *, frozen: bool = False) -> Member:
    trainable = parameter.requires_grad and not frozen
    return Member(name, tuple(parameter.shape), parameter.dtype, trainable=trainable, kind=kind)


def _rest(
    model: nn.Module, taken: set[int], shard: ShardConfig, *, layers: tuple[str, ...], frozen: bool
) -> tuple[list[Unit], tuple[tuple[str, str], ...], int]:
    """Blocks, innermost first, and the root: each takes what no inner unit has; ties between them; elements."""
    blocks = [block for block in _blocks(model) if not layers or any(n.startswith(f"{block}.") for n in layers)]
    members: dict[str, list[Member]] = {name: [] for name in blocks} | {"": []}
    first: dict[int, tuple[str, str]] = {}
    tied = []
    for name, parameter, owner in _parameters(model):
        if id(parameter) in taken:
            continue
        unit = next((block for block in blocks if name.startswith(f"{block}.")), "")
        before = first.setdefault(id(parameter), (unit, name))
        if before[1] == name:
            members[unit].append(_member(name, parameter, _foreign_kind(name, owner), frozen=frozen))
        elif before[0] != unit:
            tied.append((before[1], name))
    units = [
        Unit(name, "block" if name else "root", tuple(held), shard.param_dtype)
        for name, held in members.items()
        if held or not name
    ]
    return units, tuple(tied), sum(_elements(m) for held in members.values() for m in held)


def _elements(member: Member) -> int:
    """Elements before packing: two in each byte (Q1)."""
    return 2 * member.nbytes if member.kind == "packed" else member.numel


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Every parameter under each of its names, with the module that owns it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{leaf}".lstrip("."), parameter, module


def _blocks(model: nn.Module) -> Iterator[str]:
    """Members of module lists, innermost first."""
    names = [
        f"{name}.{index}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    ]
    return reversed(names)


def _foreign_kind(name: str, owner: nn.Module) -> Kind:
    """What a parameter of no DoRA layer of ours is."""
    if isinstance(owner, Linear4bit) and name.endswith(".weight"):
        return "packed"
    return "adapter" if "lora_" in name or "magnitude" in name else "other"


def shard_numel(unit: Unit, strategy: str, *, size: int, rank: int) -> int:
    """S1, S2: elements of a unit on one of the `size` ranks that share a copy, a flat parameter's padding included."""
    if size == 1 or strategy in ("ddp", "none"):
        return sum(m.numel for m in unit.members)
    if strategy.startswith("fsdp1"):
        return -(-flat_numel(unit, aligned=strategy == "fsdp1-orig") // size)
    return sum(_rows(m, size=size, rank=rank) * (m.numel // max(1, m.shape[0])) for m in unit.members if m.shape)


def _rows(member: Member, *, size: int, rank: int) -> int:
    """S1: rows of dim 0 on a rank: ceil(d0 / size), later ranks short or empty."""
    rows = -(-member.shape[0] // size)
    return max(0, min(rows, member.shape[0] - rank * rows))


def flat_numel(unit: Unit, *, aligned: bool) -> int:
    """S2: elements of the flat parameter before the tail's padding."""
    position = 0
    for member in unit.members:
        if aligned:
            step = ALIGNMENT // (unit.wire or member.dtype).itemsize
            position = -(-position // step) * step
        position += member.numel
    return position
