"""The other units of each strategy (S7): what is gathered together changes no result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from parity.case import Case, TrainCase
from parity.cases.declared import stack_case
from parity.cases.shapes import UNEVEN

_LARGEST_WORLD = 4
_OTHERS = {"fsdp2": "layer", "hsdp": "layer", "fsdp1": "block", "fsdp1-orig": "block", "fsdp1-hybrid": "block"}


def unit_cases() -> Iterator[Case]:
    """Each sharded clause once: bitwise, and counted where the number of collectives tells the units apart."""
    yield from _layer_units()
    cast = {"compute": "bfloat16", "param_dtype": "bfloat16", "bias": True, "counted": True}
    for strategy in ("fsdp1", "fsdp2"):  # what is cast is a unit apart, and only its count shows it
        at = {"link": "shards", "strategy": strategy, "world": 2, "steps": 2, "units": "block"}
        yield stack_case(UNEVEN, inputs="one-hot", **cast, **at)
    for strategy, world in (("fsdp1", 2), ("fsdp1-orig", 3), ("fsdp1-hybrid", 4)):
        at = {"link": "shards", "strategy": strategy, "world": world, "units": "block"}
        yield stack_case(UNEVEN, inputs="lattice", bias=True, counted=True, **at)
        yield stack_case(UNEVEN, inputs="one-hot", base="nf4", bias=True, counted=True, steps=world, **at)


def _layer_units() -> Iterator[Case]:
    fsdp2: dict[str, Any] = {"strategy": "fsdp2", "world": 2, "units": "layer"}
    hsdp: dict[str, Any] = {"strategy": "hsdp", "world": 4, "units": "layer"}
    for at in (fsdp2, hsdp):
        yield stack_case(UNEVEN, link="shards", inputs="lattice", bias=True, counted=True, **at)
        yield stack_case(UNEVEN, link="shards", inputs="lattice", base="nf4", **at)
    narrow = {"compute": "bfloat16", "param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}
    common = {"link": "training", "inputs": "one-hot", "steps": 2, **fsdp2}
    yield stack_case(UNEVEN, bias=True, **narrow, **common)
    yield stack_case(UNEVEN, base="nf4", optimizer="adamw", resume="fsdp2", **common)
    yield stack_case(UNEVEN, base="nf4", recompute=True, **common)
    late = {"link": "training", "inputs": "lattice", "tokens": 32, "accumulate": 3, "late": True}
    yield stack_case(UNEVEN, counted=True, **late, **fsdp2)


def with_other_units(cases: Iterable[Case]) -> Iterator[Case]:
    """The same questions with the other units, of all bitwise stacks of up to four ranks."""
    for case in cases:
        if (
            isinstance(case, TrainCase)
            and case.strategy in _OTHERS
            and not case.units
            and case.world <= _LARGEST_WORLD
            and case.tolerance in {"bitwise", "twin"}
        ):
            yield dataclasses.replace(case, units=_OTHERS[case.strategy])
