"""Blocks that are compiled, each as one graph: alone against the oracle, sharded against themselves unsharded."""

from __future__ import annotations

from collections.abc import Iterator

from parity.case import Case
from parity.cases.declared import stack_case
from parity.cases.shapes import UNEVEN

_SHARDED = (
    ("fsdp2", 2, ("float32", "float32")),
    ("fsdp2", 2, ("nf4", "bfloat16")),
    ("hsdp", 4, ("float32", "float32")),
    ("ddp", 2, ("nf4", "float32")),
)


def compiled_cases() -> Iterator[Case]:
    """Few: each of them waits for a compiler. Lattices are exact in whatever order its kernels add."""
    for base in ("float32", "nf4"):
        yield stack_case(UNEVEN, link="frameworks", inputs="lattice", base=base, bias=True, compiled=True)
        yield stack_case(UNEVEN, link="frameworks", base=base, compiled=True)
    for strategy, world, (base, compute) in _SHARDED:
        at = {"link": "shards", "strategy": strategy, "world": world, "steps": world}
        yield stack_case(UNEVEN, inputs="one-hot", base=base, compute=compute, compiled=True, **at)
