"""Which part of which tensor each rank ought to hold: the question and the answer (S1, S2)."""

from __future__ import annotations

from dataclasses import dataclass

from parity.shard import Index


@dataclass(frozen=True)
class LayoutQuestion:
    """Where should these parameters lie?"""

    strategy: str
    world: int
    copies: int
    """How many ranks hold the same part: those that are a whole number of shards apart (S9)."""
    members: tuple[tuple[str, tuple[int, ...], int], ...]
    """(name, global shape, item size) of each parameter, in registration order."""


Layouts = dict[tuple[str, int], Index]
"""(name, rank) to the part that the rank holds."""
