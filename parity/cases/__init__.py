"""The declared cases, a file a tier."""

from __future__ import annotations

import functools
from typing import Any, Literal

from parity.case import Case, ExchangeCase, NetworkCase, SteppedCase
from parity.cases.algebra import algebra_cases
from parity.cases.codec import codec_cases
from parity.cases.compiled import compiled_cases
from parity.cases.covering import covering_cases
from parity.cases.experts import expert_cases
from parity.cases.files import file_cases
from parity.cases.meshes import mesh_cases
from parity.cases.narrow import narrow_cases
from parity.cases.pretrained import pretrained_cases
from parity.cases.stacks import stack_cases
from parity.cases.tensor import tensor_cases
from parity.cases.training import training_cases
from parity.cases.units import unit_cases, with_other_units

Tier = Literal["quick", "full"]
TIERS: tuple[Tier, ...] = ("quick", "full")


def cases_of(tier: Tier) -> list[Case]:
    """Every case of a tier in the order of a run.

    First stacks, then networks; exchanges of files before the others, since both sides wait for each other there; then
    one-hot cases, since they keep the ranks busy while the oracle, which they do not need, works ahead; small worlds
    before large ones.
    """
    return [*_cases_of(tier)]


@functools.cache
def _cases_of(tier: Tier) -> tuple[Case, ...]:
    """Declared once: the covering arrays are a search."""
    cases = [
        *algebra_cases(),
        *codec_cases(),
        *stack_cases(tier),
        *narrow_cases(),
        *mesh_cases(tier),
        *unit_cases(),
        *expert_cases(),
        *tensor_cases(tier),
        *training_cases(tier),
        *file_cases(),
        *pretrained_cases(tier),
    ]
    known = {case.id for case in cases}
    cases += [case for case in covering_cases() if case.id not in known]  # plain rows stand above already
    if tier == "full":
        known = {case.id for case in cases}
        cases += [case for case in with_other_units(cases) if case.id not in known]
        cases += compiled_cases()
    return tuple(sorted(cases, key=_place))


def _place(case: Case) -> tuple[Any, ...]:
    blocks = case.blocks if isinstance(case, NetworkCase) else 0
    is_one_hot = isinstance(case, SteppedCase) and case.inputs == "one-hot"
    return (blocks, not isinstance(case, ExchangeCase), not is_one_hot, case.world)
