"""Every mesh and every world (S1, S2, S9), and how often a step communicates on them (S7, S11, T5)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from parity.case import Case
from parity.cases.declared import FSDP, stack_case
from parity.cases.shapes import UNEVEN
from parity.cases.worlds import LARGEST_ODD_PART, odd_part


def mesh_cases(tier: str) -> list[Case]:
    """The full tier has more worlds."""
    return [*_meshes(), *_worlds(tier), *_counted()]


def _meshes() -> Iterator[Case]:
    """S9: every mesh of replicas and shards up to eight ranks, with narrow wires that must not reach adapters (D11)."""
    for (replicas, shards), strategy in product(((2, 3), (3, 2), (4, 2)), ("hsdp", "fsdp1-hybrid")):
        world = replicas * shards
        at = {"link": "shards", "strategy": strategy, "world": world, "replicas": replicas}
        yield stack_case(UNEVEN, inputs="lattice", base="nf4", **at)
    for (replicas, shards), strategy in product(((2, 2), (2, 3), (3, 2)), ("hsdp", "fsdp1-hybrid")):
        at = {"link": "shards", "strategy": strategy, "world": replicas * shards, "replicas": replicas}
        narrow = {"compute": "bfloat16", "param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}
        if replicas == shards:  # else an axis of 3 divides by itself, and rounds where the twin does not
            yield stack_case(UNEVEN, inputs="one-hot", steps=4, **narrow, **at)
        yield stack_case(UNEVEN, inputs="gaussian", steps=2, reduce_dtype="bfloat16", **at)
    for strategy, world in (("fsdp1", 2), ("fsdp1-orig", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp1-hybrid", 4)):
        at = {"link": "shards", "strategy": strategy, "world": world, "keep_gathered": True}
        yield stack_case(UNEVEN, inputs="one-hot", base="nf4", steps=world, **at)


def world_cases(world: int) -> Iterator[Case]:
    """S1, S2 at any world: exact where the certificate reaches, and with one rank hot."""
    for strategy, base in product(FSDP, ("float32", "nf4")):
        at = {"link": "shards", "strategy": strategy, "world": world, "base": base}
        if odd_part(world) <= LARGEST_ODD_PART["float32"]:
            yield stack_case(UNEVEN, inputs="lattice", **at)
        elif base == "nf4":
            yield stack_case(UNEVEN, inputs="one-hot", steps=2, **at)


def _worlds(tier: str) -> Iterator[Case]:
    """S1, S2 at the other worlds; at 16 and with fewer tokens than ranks some ranks have nothing at all."""
    for world in (5, 6, 7, 8, 16) if tier == "full" else (5,):
        yield from world_cases(world)
    for strategy in FSDP:
        yield stack_case(UNEVEN, link="shards", inputs="lattice", strategy=strategy, world=3, tokens=2)


_COUNTED = (("fsdp1", 2), ("fsdp1-orig", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp1-hybrid", 4))
"""Strategies whose collectives torch's dispatcher sees; DDP's reducer goes past it."""


def _counted() -> Iterator[Case]:
    """S7, S9, S11: how often a step gathers and reduces, which says what the units are."""
    for strategy, world in _COUNTED:
        at = {"link": "shards", "strategy": strategy, "world": world, "counted": True}
        yield stack_case(UNEVEN, inputs="lattice", bias=True, **at)
        yield stack_case(UNEVEN, inputs="lattice", keep_gathered=True, **at)
        for late in (False, True):
            yield stack_case(UNEVEN, inputs="lattice", tokens=32, accumulate=3, late=late, **at)
