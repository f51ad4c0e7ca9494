"""The oracle of layouts: which part of each tensor each rank ought to hold (S1, S2, S7, S9), from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast, get_args

from parity.case import TrainCase
from parity.oracle.prediction import LayoutQuestion, Layouts
from parity.oracle.weights import CODES, STACK_STORAGE, stored_shape
from parity.shard import Index
from ref import layouts as rules
from ref.mesh import placement_of, rank_part
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
            parts = _unit_layout(case, unit, rank)
            if case.experts:
                shapes = {name: shape for name, shape, _ in unit}
                parts = [
                    own for name, index in parts for own in _of_experts(name, shapes[name], index, len(case.layers))
                ]
            layouts |= {(name, rank): index for name, index in parts}
    return layouts


def _of_experts(name: str, shape: tuple[int, ...], index: Index, count: int) -> Iterator[tuple[str, Index]]:
    """D16: which part of each expert's own tensor lies in a part of the stack's; packed bytes follow one another."""
    _, _, leaf = name.partition(".")
    flat = len(index) == 1
    rows = math.prod(shape) // count if flat else shape[0] // count
    for expert in range(count):
        first, last = (min(max(end - expert * rows, 0), rows) for end in (index[0].start, index[0].stop))
        if flat or shape[0] != count:
            own: Index = (slice(first, last), *index[1:])
        else:  # an expert is a row, there or not
            own = (slice(0, shape[1] if last > first else 0), *index[2:])
        yield f"layers.{expert}.{leaf}", own


def _units(case: TrainCase) -> Iterator[list[Member]]:
    """S7: a layer of a stack is a block; cut by layers, its base weight and bias and its adapter have one unit each."""
    width = 2 if case.base == "bfloat16" else 4
    if case.experts:
        yield from _cut_into_units(case, *_stack_members(case))
        return
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
        yield from _cut_into_units(case, base, bias, adapter)


def _stack_members(case: TrainCase) -> tuple[list[Member], list[Member], list[Member]]:
    """D16: the stack's weight, no bias, and its adapter, each with an axis of experts in front."""
    count, (fan_in, fan_out) = len(case.layers), case.layers[0]
    (rows, columns), width = stored_shape(case, (fan_out, fan_in))
    shape = (count * rows, columns) if case.base in CODES else (count, rows, columns)
    shapes = {"lora_A": (case.rank, fan_in), "lora_B": (fan_out, case.rank), "magnitude": (fan_out,)}
    return (
        [("stack.base.weight", shape, width)],
        [],
        [(f"stack.{name}", (count, *of_one), 4) for name, of_one in shapes.items()],
    )


def _cut_into_units(
    case: TrainCase, base: list[Member], bias: list[Member], adapter: list[Member]
) -> Iterator[list[Member]]:
    if case.unit_rule == "layer":
        yield from filter(None, (base, bias, adapter))
        return
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
    return cast(
        "rules.Strategy",
        {"fsdp1-hybrid": "fsdp1", "hsdp": "fsdp2", "fsdp2-tp": "fsdp2", "tp": "fsdp2"}.get(
            case.strategy, case.strategy
        ),
    )


def _unit_layout(case: TrainCase, unit: list[Member], rank: int) -> list[tuple[str, Index]]:
    if case.tensor_ranks > 1:
        return [(name, _tensor_part(case, name, shape, rank)) for name, shape, _ in unit]
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


def _tensor_part(case: TrainCase, name: str, shape: tuple[int, ...], rank: int) -> Index:
    """S10: the tensor axis cuts first, and is the innermost of the mesh."""
    layer, leaf = ".".join(name.split(".")[:2]), name.split(".")[2]
    placement = placement_of(
        "weight" if leaf == "base" else leaf, cut="row" if case.is_row_parallel(layer) else "column"
    )
    ranks = case.tensor_ranks
    return rank_part(shape, placement, tensor=(rank % ranks, ranks), shard=(case.data_rank(rank), case.world // ranks))


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)
