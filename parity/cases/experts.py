"""D16: experts, the layers of one stack, under every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parity.case import Case
from parity.cases.declared import stack_case
from parity.cases.shapes import EXPERTS

_PLACES = (("fsdp1", 2), ("fsdp1-orig", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2))


def expert_cases() -> Iterator[Case]:
    """Bitwise: unsharded in both orientations, sharded with each base, and a rank at a time.

    Dropout is left to tests: an expert draws its own masks.
    """
    for experts in ("out-in", "in-out"):
        for stored in _stored():
            yield _case(link="frameworks", inputs="lattice", experts=experts, **stored)
    for strategy, world in _PLACES:
        at = {"link": "shards", "strategy": strategy, "world": world}
        yield _case(inputs="lattice", experts="in-out", **at)
        for stored in _stored():
            yield _case(inputs="one-hot", experts="out-in", steps=world, **stored, **at)
    layers = {"link": "shards", "strategy": "fsdp2", "world": 2, "units": "layer"}
    yield _case(inputs="lattice", experts="out-in", base="nf4", **layers)


def _stored() -> Iterator[dict[str, Any]]:
    """What the stack may be stored in."""
    yield {}
    yield {"base": "nf4"}


def _case(**fields: Any) -> Case:
    """With the clause that they are here for."""
    case = stack_case(EXPERTS, activation="relu", **fields)
    return replace(case, clauses=(*case.clauses, "D16"))
