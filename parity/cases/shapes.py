"""The named stacks of layers. Few shapes, since each costs the oracle a compilation.

A layer is `(in, out)`. `out` is no multiple of 2, 3 or 4 anywhere; r is below the world size in `thin`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DENSE_LATTICE_SCALING = 3.0
"""A small integer, so that lattices stay exact."""


@dataclass(frozen=True)
class Shape:
    """A stack of layers and its adapters' rank."""

    name: str
    layers: tuple[tuple[int, int], ...]
    rank: int
    scaling: float
    """s on Gaussian numbers. Nowhere 2: there 2 s = s^2, and a cross term taken for another would not show (D13)."""
    packed_lattice_scaling: float
    """s on NF4 lattices, whose codes leave little room; dense ones have `DENSE_LATTICE_SCALING`."""
    why: str


UNEVEN = Shape(
    "uneven", ((96, 50), (50, 33)), 4, 1.25, 1.0, "NF4 blocks cut in the middle at world 2; out divides by no world"
)
PADDED = Shape(
    "padded", ((66, 65), (65, 66)), 8, 0.7, 1.0, "2,145 packed bytes, no multiple of any storage's item size"
)
THIN = Shape("thin", ((40, 27), (27, 30)), 2, 2.5, 4.0, "r below the world size: ranks with an empty shard of A")
SINGLE_ROW = Shape("single-row", ((64, 1),), 2, 1.5, 3.0, "out = 1: ranks with empty shards of B and the magnitude")

DEEP = Shape("deep", ((24, 20), (20, 18), (18, 15)), 2, 1.5, 1.0, "three layers, so that one is neither first nor last")
ODD = Shape("odd", ((67, 33), (33, 19)), 3, 5 / 3, 1.0, "odd element counts: the last byte carries one nibble")
MANY_BLOCKS = Shape("many-blocks", ((160, 104),), 2, 1.5, 1.0, "260 blocks: a second nested block (Q6)")

LLAMA = Shape(
    "llama",
    (*((80, 80), (80, 40), (80, 40), (80, 80)), *((80, 211), (80, 211), (211, 80)), *((80, 32), (80, 32))),
    2,
    1.5,
    1.0,
    "q, k, v, o, gate, up, down, embedding, head: rows of 80 and 211 cut blocks, a second nested one, cut short",
)


def layer_of(shape: Shape, position: int) -> Shape:
    """One layer of a stack alone."""
    return replace(shape, name=f"{shape.name}-{position}", layers=shape.layers[position : position + 1])


EXPERTS = Shape(
    "experts",
    ((48, 48),) * 3,
    3,
    1.25,
    1.0,
    "three of one stack (D16): one for two ranks of four each, none for the last",
)
EVEN = Shape("even", ((96, 96), (96, 35)), 3, 1.25, 1.0, "two to four tensor ranks: a column's features are a row's")
TURNED = Shape("turned", ((96, 35), (35, 96)), 3, 1.25, 1.0, "a row, whose input is sliced, and a column, gathered")
WIDE = Shape("wide", ((64, 128), (128, 35)), 3, 1.25, 1.0, "whole blocks of 32 for two and four tensor ranks (S10)")
NESTED = Shape("nested", ((64, 256),), 2, 1.5, 1.0, "two tensor ranks with a whole nested block each (Q6, S10)")
SHAPES = (UNEVEN, PADDED, THIN, SINGLE_ROW)
