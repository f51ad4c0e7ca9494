"""The oracle of layouts: which part of each tensor each rank ought to hold (S1, S2, S7, S9), from shapes alone."""

from __future__ import annotations

from parity.oracle.prediction import LayoutQuestion, Layouts
from parity.shard import Index
from ref import layouts as rules
from ref.model_layouts import ALIGNED_BYTES


def predict_layout(question: LayoutQuestion) -> Layouts:
    """FSDP2 cuts dim 0; FSDP1 cuts each unit's flat parameter. World 1 is not cut at all, nor are replicas."""
    layouts: Layouts = {}
    for unit in _units(question).values():
        for rank in range(question.world):
            layouts |= {(name, rank): index for name, index in _unit_layout(question, unit, rank)}
    return layouts


def _units(question: LayoutQuestion) -> dict[str, list]:
    """S7: a layer's A, B and magnitude share a unit; its base weight and its bias have one each."""
    units: dict[str, list] = {}
    for member in question.members:
        parent, _, leaf = member[0].rpartition(".")
        own = leaf in {"lora_A", "lora_B", "magnitude"}
        units.setdefault(parent if own else member[0], []).append(member)
    return units


def _unit_layout(question: LayoutQuestion, unit: list, rank: int) -> list[tuple[str, Index]]:
    size = question.world // question.copies  # the ranks of one row of the mesh, which share one copy
    if not question.strategy.startswith("fsdp1"):
        return [
            (name, (rules.fsdp2_row_range(shape[0], world_size=size, rank=rank % size), *_whole(shape[1:])))
            for name, shape, _ in unit
        ]
    alignment = ALIGNED_BYTES // unit[0][2] if question.strategy == "fsdp1-orig" else None
    members = [(name, shape) for name, shape, _ in unit]
    layout = rules.flat_layout(members, world_size=size, alignment=alignment)
    return [(name, (part,)) for name, part in layout.shard(rank)]


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)
