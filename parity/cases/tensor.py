"""S10: tensor ranks, alone and in rows of a mesh whose columns are FSDP2's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from parity.case import Case
from parity.cases.declared import stack_case
from parity.cases.shapes import EVEN, NESTED, TURNED, UNEVEN, WIDE, Shape, layer_of

_PLACES = (("tp", 2), ("tp", 3), ("tp", 4), ("fsdp2-tp", 4))
_PACKED = {"base": "nf4", "blocksize": 32}
"""Blocks of which a tensor rank's part of each layer has whole ones."""


def tensor_cases(tier: str) -> Iterator[Case]:
    """On lattices, where sums over tensor ranks are exact in any order; and within the oracle's bounds.

    The quick tier has what a layer may have besides under `fsdp2-tp` alone.
    """
    for (strategy, world), shape in product(_PLACES, (EVEN, TURNED)):
        yield _case(shape, inputs="lattice", strategy=strategy, world=world)
    for strategy, world in _PLACES if tier == "full" else (("tp", 3), ("fsdp2-tp", 4)):
        packed = {3: EVEN}.get(world, WIDE)  # what divides by three has no whole blocks by four
        at = {"strategy": strategy, "world": world}
        yield _case(packed, inputs="lattice", **_PACKED, **at)
        yield _case(packed, inputs="gaussian", **_PACKED, **at)  # scales that differ
        yield _case(EVEN, inputs="gaussian", steps=2, optimizer="adamw", bias=True, activation="relu", **at)
    for strategy, world in (("tp", 2), ("fsdp2-tp", 4)) if tier == "full" else (("fsdp2-tp", 4),):
        yield from _features({"strategy": strategy, "world": world})
    yield _case(NESTED, inputs="gaussian", strategy="tp", world=2, **_PACKED)
    at = {"strategy": "fsdp2-tp", "world": 4}
    yield _case(EVEN, inputs="lattice", units="layer", **at)
    yield _case(WIDE, inputs="lattice", units="layer", **_PACKED, **at)
    yield _case(EVEN, inputs="lattice", keep_gathered=True, **at)
    yield _case(EVEN, inputs="gaussian", compute="bfloat16", param_dtype="bfloat16", reduce_dtype="bfloat16", **at)


def _features(at: dict[str, Any]) -> Iterator[Case]:
    """What a layer may have besides."""
    yield _case(EVEN, inputs="lattice", bias=True, zero_rows=True, **at)
    yield _case(TURNED, inputs="lattice", bias=True, activation="relu", **at)
    yield _case(EVEN, inputs="lattice", zero_b=True, **at)
    yield _case(EVEN, inputs="lattice", dropout=0.5, **at)
    yield _case(TURNED, inputs="lattice", dropout=0.5, batched=True, **at)
    yield _case(WIDE, inputs="lattice", flat=True, **_PACKED, **at)
    yield _case(EVEN, inputs="lattice", method="lora", bias=True, **at)
    for position in range(len(UNEVEN.layers)):  # a column, and a row
        yield _case(layer_of(UNEVEN, position), inputs="lattice", base="bfloat16", compute="bfloat16", **at)
    yield _case(EVEN, inputs="lattice", recompute=True, **at)
    yield _case(EVEN, inputs="lattice", tokens=32, accumulate=3, late=True, **at)
    yield _case(EVEN, inputs="lattice", clip=0.5, **at)
    for shape in (EVEN, TURNED):
        yield _case(shape, inputs="lattice", counted=True, zero_b=True, **at)
    yield _case(EVEN, inputs="gaussian", steps=2, optimizer="adamw", resume=at["strategy"], **at)


def _case(shape: Shape, **fields: Any) -> Case:
    trains = {"accumulate", "clip", "resume", "optimizer"} & set(fields)
    return stack_case(shape, link="training" if trains else "shards", **fields)
