"""The oracle of layouts: which part of each tensor each rank ought to hold (S1, S2, S7, S9), from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast, get_args

from parity.case import TrainCase
from parity.oracle.prediction import LayoutQuestion, Layouts
from parity.oracle.weights import CODES, STACK_STORAGE, stored_shape
from parity.shard import Index
from ref import layouts as rules
from ref.model_layouts import ALIGNED_BYTES

_STORED = {1: "uint8", 2: "bfloat16", 4: "float32"}
"""By bytes an element: what a unit's members may be stored in."""
_TRAINED = ("lora_A", "lora_B", "magnitude")
Member = tuple[str, tuple[int, ...], int]
"""(name, unsharded shape, bytes an element) of a parameter."""


def predict_layout(question: LayoutQuestion) -> Layouts:
    """FSDP2 cuts dim 0; FSDP1 cuts each unit's flat parameter. World 1 is not cut at all, nor are replicas."""
    layouts: Layouts = {}
    case = question.case
    if case.base in CODES:
        rules.wire_dtype(STACK_STORAGE, param_dtype=case.param_dtype)
    for unit in _units(case):
        _require_alike(case, unit)
        for rank in range(case.world):
            layouts |= {(name, rank): index for name, index in _unit_layout(case, unit, rank)}
    return layouts


def _units(case: TrainCase) -> Iterator[list[Member]]:
    """S7: a layer of a stack is a block; cut by layers, its base weight and bias and its adapter have one unit each."""
    width = 2 if case.base == "bfloat16" else 4
    for position, (fan_in, fan_out) in enumerate(case.layers):
        name = f"layers.{position}"
        shape, stored_width = stored_shape(case, (fan_out, fan_in))
        base: list[Member] = [(f"{name}.base.weight", shape, stored_width)]
        bias: list[Member] = [(f"{name}.bias.value", (fan_out,), width)] if case.bias else []
        adapter: list[Member] = [
            (f"{name}.lora_A", (case.rank, fan_in), 4),
            (f"{name}.lora_B", (fan_out, case.rank), 4),
        ]
        adapter += [(f"{name}.magnitude", (fan_out,), 4)] if case.method == "dora" else []
        if case.unit_rule == "layer":
            yield from filter(None, (base, bias, adapter))
            continue
        members = {member[0]: member for member in (*adapter, *base, *bias)}
        as_units = _as_units(case, [*members.values()])
        for unit in rules.block_units(as_units, strategy=_cut(case), param_dtype=case.param_dtype):
            yield [members[member.name] for member in unit]


def _as_units(case: TrainCase, members: list[Member]) -> list[rules.UnitMember]:
    """What decides whether they may share a unit."""
    dense = () if case.base in CODES else ("base.weight",)
    return [
        rules.UnitMember(name, _STORED[width], name.endswith(_TRAINED), castable=name.endswith(dense))
        for name, _, width in members
    ]


def _require_alike(case: TrainCase, unit: list[Member]) -> None:
    """S7: what the reference would refuse to put into one unit has no layout."""
    strategy = _cut(case)
    if strategy in get_args(rules.Strategy):
        rules.check_unit(_as_units(case, unit), strategy=strategy)


def _cut(case: TrainCase) -> rules.Strategy:
    """How each row of a mesh is cut."""
    return cast("rules.Strategy", {"fsdp1-hybrid": "fsdp1", "hsdp": "fsdp2"}.get(case.strategy, case.strategy))


def _unit_layout(case: TrainCase, unit: list[Member], rank: int) -> list[tuple[str, Index]]:
    size = case.world // case.copies  # the ranks of one row of the mesh, which share one copy
    if not case.strategy.startswith("fsdp1"):
        return [
            (name, (rules.fsdp2_row_range(shape[0], world_size=size, rank=rank % size), *_whole(shape[1:])))
            for name, shape, _ in unit
        ]
    alignment = ALIGNED_BYTES // unit[0][2] if case.strategy == "fsdp1-orig" else None
    members = [(name, shape) for name, shape, _ in unit]
    layout = rules.flat_layout(members, world_size=size, alignment=alignment)
    return [(name, (part,)) for name, part in layout.shard(rank % size)]


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)
