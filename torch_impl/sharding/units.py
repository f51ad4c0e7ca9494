"""The units a model would be cut into, from shapes alone: nothing is wrapped, gathered or even materialised.

Axes: O output features, I input features, R adapter rank.
Clauses: S1, S2 (what a rank holds of a unit), S7 (the rule of the units, as `torch_impl.sharding.apply` applies it).

A *unit* is a set of parameters that is gathered and freed together. A model that has DoRA layers, or is planned to
have them, is cut by this package's rule: by blocks and the root, or by base, bias, adapter, block, root. Any other
model (PEFT's, say) has no such layers: its units are its blocks, the members of its module lists, and the root.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from torch_impl.config import DoraConfig, QuantConfig, ShardConfig
from torch_impl.inject import target, target_names
from torch_impl.layers.dora import DoraLayer, PackedBase
from torch_impl.layers.experts import Stack
from torch_impl.layers.kinds import Target, is_linear4bit, rows_of
from torch_impl.strategies import STRATEGIES

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
    decoded_shape: tuple[int, int] | None = None
    """(O, I) of a base weight; of any kind of layer, its rows and the numbers of one (D3)."""

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
    rule: Literal["base", "bias", "adapter", "cast", "block", "root"]
    """Which line of the rule made it (S7)."""
    members: tuple[Member, ...]
    """In registration order, which S2's layout depends on."""
    wire: torch.dtype | None
    """What it is gathered as; None is as stored."""

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
    layers: dict[str, list[Unit]] = {}
    taken: set[int] = set()
    buffer_bytes = total = 0
    for name, module in _adapted(model, dora):
        if isinstance(module, DoraLayer):
            units, state, size = _live(name, module, shard), 0, module.rows.length * module.rows.out
        else:
            assert dora is not None  # noqa: S101 - else nothing is planned
            units, state, size = _planned(name, module, dora, shard)
        layers[name] = units
        buffer_bytes += state
        total += size + sum(m.numel for u in units for m in u.members if u.rule != "base")
        taken |= {
            id(parameter) for parameter in (module.parameters() if isinstance(module, nn.Module) else [module.weight])
        }
    blocks = block_names(model, layers) if layers else _members(model)
    rest, tied, more = _rest(model, taken, shard, blocks=blocks, frozen=dora is not None)
    if layers and shard.unit_rule == "block":
        units = (*_whole_blocks(model, blocks, layers, rest, shard), rest[-1])
    else:
        units = (*itertools.chain.from_iterable(layers.values()), *(u for u in rest if u.members or u.rule == "root"))
    return Plan(
        units=units,
        buffer_bytes=buffer_bytes + sum(b.numel() * b.dtype.itemsize for b in model.buffers()),
        tied=tied,
        total=total + more,
        trainable=sum(m.numel for u in units for m in u.members if m.trainable),
    )


def _adapted(model: nn.Module, dora: DoraConfig | None) -> Iterator[tuple[str, Target]]:
    """The DoRA layers, and what is to become one, in the order in which modules are registered."""
    names = [] if dora is None else list(target_names(model, dora))
    planned = {key for key in (target(model, name) for name in names) if rows_of(key) is not None}
    for name, module in model.named_modules():
        if isinstance(module, DoraLayer) or module in planned:
            yield name, module
        yield from ((f"{name}.{s.leaf}", s) for s in map(partial(Stack, module), module._parameters) if s in planned)  # noqa: SLF001


def _live(name: str, layer: DoraLayer, shard: ShardConfig) -> list[Unit]:
    """A DoRA layer's units as it is."""
    packed = isinstance(layer.base, PackedBase)
    weight = _member(f"{name}.base.weight", layer.base.weight, "packed" if packed else "weight")
    weight = replace(weight, decoded_shape=(layer.rows.out, layer.rows.length))
    units = [Unit(f"{name}.base", "base", (weight,), None if packed else shard.param_dtype)]
    if layer.bias is not None:
        units.append(Unit(f"{name}.bias", "bias", (_member(f"{name}.bias.value", layer.bias.value, "bias"),), None))
    adapter = [_member(f"{name}.{leaf}", p, "adapter") for leaf, p in layer.named_parameters(recurse=False)]
    return [*units, Unit(name, "adapter", tuple(adapter), None)]


def _planned(name: str, module: Any, dora: DoraConfig, shard: ShardConfig) -> tuple[list[Unit], int, int]:
    """The units that a layer would have, its quant state's bytes, and its weight's elements."""
    rows = rows_of(module)
    assert rows is not None  # noqa: S101 - the caller has asked
    weight, state = _planned_weight(f"{name}.base.weight", module.weight, dora.quant_config)
    weight = replace(weight, decoded_shape=(rows.out, rows.length))
    wire = None if weight.kind == "packed" else shard.param_dtype
    units = [Unit(f"{name}.base", "base", (weight,), wire)]
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


def block_names(model: nn.Module, layers: Collection[str]) -> list[str]:
    """S7: members of module lists that hold any of these layers, and the layers that none holds; innermost first."""
    held = [block for block in _members(model) if any(name.startswith(f"{block}.") for name in layers)]
    return [*held, *(name for name in layers if not any(name.startswith(f"{block}.") for block in held))]


def _whole_blocks(
    model: nn.Module, blocks: list[str], layers: dict[str, list[Unit]], rest: list[Unit], shard: ShardConfig
) -> Iterator[Unit]:
    """`units="block"`: what `rest` left each block, and its layers' parameters; first what is to be cast, apart.

    A flat parameter's members are alike besides: what trains comes last, as the innermost.
    """
    left = {unit.name: unit.members for unit in rest if unit.rule == "block"}
    order = _order(model, layers)
    flat = shard.how.flat
    for block in blocks:
        inside = [name for name in layers if name == block or name.startswith(f"{block}.")]
        units = itertools.chain.from_iterable(layers.pop(name) for name in inside)
        members = [*(member for unit in units for member in unit.members), *left.get(block, ())]
        alike: dict[tuple[Any, ...], list[Member]] = {}
        to_cast = _to_cast(members, shard.param_dtype)
        for member in sorted(members, key=lambda m: (_registered(m.name, order), _PLACES.index(m.kind))):
            cast = _owner(member) in to_cast
            key = (not cast, member.trainable, str(member.dtype)) if flat else (not cast,)
            alike.setdefault(key, []).append(member)
        for (kept, *_), together in sorted(alike.items()):
            yield Unit(block, "block" if kept else "cast", tuple(together), None if kept else shard.param_dtype)


_PLACES = ("other", "adapter", "packed", "weight", "bias")
"""The order in which a layer registers what it has, by kind."""


def _order(model: nn.Module, layers: Collection[str]) -> dict[str, float]:
    """Where modules stand; a stack of experts that is to be adapted is to stand last in its module, in its turn."""
    order: dict[str, float] = {name: position for position, (name, _) in enumerate(model.named_modules())}
    stacks = [name for name in layers if name not in order]
    for turn, name in enumerate(stacks, start=1):
        owner = name.rpartition(".")[0]
        last = max(place for other, place in order.items() if f"{other}.".startswith(f"{owner}."))
        order[name] = int(last) + turn / (len(stacks) + 1)
    return order


def _registered(name: str, order: Mapping[str, float]) -> float:
    """Where the module stands that has this parameter, or is to have it."""
    while name not in order:
        name = name.rpartition(".")[0]
    return order[name]


def _to_cast(members: list[Member], param_dtype: torch.dtype | None) -> set[str]:
    """Modules whose parameters a block gathers apart, as `param_dtype`: frozen dense weights and norms of another."""
    kept = {_owner(m) for m in members if m.trainable or m.kind not in ("weight", "other")}
    others = {_owner(m) for m in members if m.shape and param_dtype not in (None, m.dtype)}
    return others - kept


def _owner(member: Member) -> str:
    """The module that has this parameter."""
    return member.name.rpartition(".")[0]


def _rest(
    model: nn.Module, taken: set[int], shard: ShardConfig, *, blocks: list[str], frozen: bool
) -> tuple[list[Unit], tuple[tuple[str, str], ...], int]:
    """Blocks, innermost first, and the root: each takes what no inner unit has; ties between them; elements."""
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
    units = [Unit(name, "block" if name else "root", tuple(held), shard.param_dtype) for name, held in members.items()]
    return units, tuple(tied), sum(_elements(m) for held in members.values() for m in held)


def _elements(member: Member) -> int:
    """Elements before packing: two in each byte (Q1)."""
    return 2 * member.nbytes if member.kind == "packed" else member.numel


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Every parameter under each of its names, with the module that owns it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{leaf}".lstrip("."), parameter, module


def _members(model: nn.Module) -> list[str]:
    """Members of module lists, innermost first."""
    names = [
        f"{name}.{index}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    ]
    return names[::-1]


def _foreign_kind(name: str, owner: nn.Module) -> Kind:
    """What a parameter of no DoRA layer of ours is."""
    if is_linear4bit(owner) and name.endswith(".weight"):
        return "packed"
    return "adapter" if "lora_" in name or "magnitude" in name else "other"


def shard_numel(unit: Unit, strategy: str, *, size: int, rank: int) -> int:
    """S1, S2: elements of a unit on one of the `size` ranks that share a copy, a flat parameter's padding included."""
    how = STRATEGIES[strategy]
    if size == 1 or not how.cuts:
        return sum(m.numel for m in unit.members)
    if how.flat:
        return -(-flat_numel(unit, aligned=how.keeps_originals) // size)
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
