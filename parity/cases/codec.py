"""Link 3 for the 4-bit storage: packed bytes, absmax and decoded weights, every bit (Q1 to Q6)."""

from __future__ import annotations

from itertools import product
from typing import Any

from parity.case import Case, DecodeCase
from parity.cases.shapes import MANY_BLOCKS, ODD, SHAPES, Shape

_CLAUSES = ("Q1", "Q2", "Q3", "Q4", "Q5", "Q6")


def codec_cases() -> list[Case]:
    """Each shape's weights, decoded to float32 and to bfloat16: ordinary ones, blocks of zeros, and ties."""
    plain = [
        _case(shape, compute=compute, zero_rows=zero_rows)
        for shape, compute, zero_rows in product(SHAPES, ("float32", "bfloat16"), (False, True))
    ]
    rest = [_case(shape, compute=compute) for shape, compute in product((ODD, MANY_BLOCKS), ("float32", "bfloat16"))]
    return plain + rest + [_case(shape, inputs="ties") for shape in SHAPES]


def _case(shape: Shape, **fields: Any) -> Case:
    return DecodeCase(
        link="frameworks",
        layers=shape.layers,
        shape_name=shape.name,
        rank=shape.rank,
        alpha=shape.scaling * shape.rank,
        base="nf4",
        clauses=_CLAUSES,
        **fields,
    )
