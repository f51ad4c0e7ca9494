"""Link 3 for the 4-bit storage: packed bytes, absmax and decoded weights, every bit (Q1 to Q6)."""

from __future__ import annotations

from itertools import product

from parity.case import Case
from parity.cases.shapes import SHAPES

_CLAUSES = ("Q1", "Q2", "Q3", "Q4", "Q5", "Q6")


def codec_cases() -> list[Case]:
    """Each shape's weights, decoded to float32 and to bfloat16; `zero_rows` has blocks of zeros."""
    return [
        Case(
            link="frameworks",
            model="codec",
            proof="decode",
            layers=shape.layers,
            shape_name=shape.name,
            rank=shape.rank,
            alpha=2.0 * shape.rank,
            base="nf4",
            compute=compute,
            zero_rows=zero_rows,
            clauses=_CLAUSES,
        )
        for shape, compute, zero_rows in product(SHAPES, ("float32", "bfloat16"), (False, True))
    ]
