"""Who is only compared with itself is judged as well: unsharded cases against the reference, added to a choice.

A one-hot case shows that sharding changes nothing. It says nothing of what is sharded: an implementation whose every
value is 7 agrees with itself. So a choice of such cases brings along unsharded ones of the same kind.
"""

from __future__ import annotations

import dataclasses

from parity.case import UNSHARDED, Case
from parity.cases import Tier, cases_of
from parity.pipeline import Assignment

_EXACT_FIRST = ("lattice", "bound")


def with_judges(assignments: list[Assignment], tier: Tier, seed: int) -> list[Assignment]:
    """The assignments, and for each implementation what judges it unsharded where nothing chosen does."""
    added: list[Assignment] = []
    for implementation in dict.fromkeys(name for _, name in assignments):
        cases = [case for case, name in assignments if name == implementation]
        added += [(case, implementation) for case in _judges(cases, tier, seed)]
    return [*added, *assignments]


def _judges(cases: list[Case], tier: Tier, seed: int) -> list[Case]:
    judged = {_kind(case) for case in cases if not case.has_twin and case.task == "train"}
    wanted = {_kind(case): case for case in cases if case.has_twin and case.task == "train"}
    found: dict[str, Case] = {}
    for kind, case in wanted.items():
        if kind not in judged:
            judge = _nearest(case, tier, seed)
            found |= {judge.id: judge} if judge else {}
    return list(found.values())


def _kind(case: Case) -> tuple:
    """What one judge can speak for: the stored base and the compute dtype."""
    return case.subject, case.base, case.compute


def _nearest(case: Case, tier: Tier, seed: int) -> Case | None:
    """An unsharded case of that kind: of the same shape and exact, if there is one."""
    candidates = [dataclasses.replace(other, seed=seed) for other in cases_of(tier) if _can_judge(other, case)]
    return min(candidates, key=lambda other: _rank(other, case), default=None)


def _can_judge(other: Case, case: Case) -> bool:
    return (
        _kind(other) == _kind(case)
        and other.model == "stack"
        and other.strategy == UNSHARDED
        and other.task == "train"
        and other.proof in _EXACT_FIRST
    )


def _rank(other: Case, case: Case) -> tuple:
    differences = sum(getattr(other, name) != getattr(case, name) for name in ("layers", "bias", "dropout", "method"))
    return differences, _EXACT_FIRST.index(other.proof), len(other.id)
