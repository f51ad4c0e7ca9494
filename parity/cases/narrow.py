"""Compute in bfloat16 and float16, bitwise against the oracle (D11)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from parity.case import Case
from parity.cases.declared import stack_case
from parity.cases.shapes import SHAPES, UNEVEN, layer_of


def narrow_cases() -> Iterator[Case]:
    """Lattices whose every product and sum the compute dtype holds, alone and on ranks that add them up.

    Two layers certify in four bits alone; odd worlds multiply the cotangent by what bfloat16 does not hold.
    """
    narrow = {"inputs": "lattice", "compute": "bfloat16"}
    layers = [layer_of(shape, position) for shape in SHAPES for position in range(len(shape.layers))]
    for layer, base in product(layers, ("bfloat16", "nf4")):
        yield stack_case(layer, link="frameworks", base=base, **narrow)
    yield stack_case(UNEVEN, link="frameworks", base="nf4", tokens=8, **narrow)
    yield stack_case(layer_of(UNEVEN, 1), link="frameworks", base="float32", **narrow)
    last = layer_of(UNEVEN, 1)
    for base, features in product(("bfloat16", "nf4"), _NARROW_FEATURES):
        yield stack_case(last, link="frameworks", base=base, tokens=8, **features, **narrow)
    for (strategy, world), base in product(_PLACES, ("bfloat16", "nf4")):
        yield stack_case(last, link="shards", base=base, strategy=strategy, world=world, **narrow)
    half = {"inputs": "lattice", "compute": "float16", "bias": True}
    for base in ("float32", "nf4"):
        yield stack_case(last, link="frameworks", base=base, **half)
        yield stack_case(last, link="frameworks", base=base, tokens=8, dropout=0.5, **half)
        yield stack_case(last, link="shards", base=base, strategy="fsdp2", world=2, **half)
        yield stack_case(last, link="frameworks", base=base, **half | {"bias": False})
    for strategy, world in (("fsdp1", 2), ("fsdp2", 2), ("hsdp", 4)):
        wire = {"param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}
        yield stack_case(last, link="shards", base="bfloat16", strategy=strategy, world=world, **wire, **narrow)


_PLACES = (("fsdp1", 2), ("fsdp1-orig", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2))
"""Strategies at worlds that are powers of two."""
_NARROW_FEATURES: tuple[dict[str, Any], ...] = (
    {"bias": True},
    {"zero_rows": True, "bias": True},
    {"zero_b": True},
    {"dropout": 0.5},
)
