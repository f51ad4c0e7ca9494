"""The named stacks of layers. Few shapes, since each costs the oracle a compilation.

A layer is `(in, out)`. `out` is no multiple of 2, 3 or 4 anywhere; r is below the world size in `thin`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A stack of layers and its adapters' rank."""

    name: str
    layers: tuple[tuple[int, int], ...]
    rank: int
    why: str


UNEVEN = Shape("uneven", ((96, 50), (50, 33)), 4, "NF4 blocks cut in the middle at world 2; out divides by no world")
PADDED = Shape("padded", ((66, 65), (65, 66)), 8, "2,145 packed bytes, no multiple of any storage's item size")
THIN = Shape("thin", ((40, 27), (27, 30)), 2, "r below the world size: ranks with an empty shard of A")
SINGLE_ROW = Shape("single-row", ((64, 1),), 2, "out = 1: ranks with empty shards of B and the magnitude")

SHAPES = (UNEVEN, PADDED, THIN, SINGLE_ROW)
