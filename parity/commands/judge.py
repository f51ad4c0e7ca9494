"""Who is only compared with itself is judged as well: unsharded cases against the reference, added to a choice.

A one-hot case shows that sharding changes nothing. It says nothing of what is sharded: an implementation whose every
value is 7 agrees with itself. So a choice of such cases brings along unsharded ones of the same kind.
"""

from __future__ import annotations

import dataclasses

from parity.case import UNSHARDED, Case, ExchangeCase, MergeCase, RefuseCase, TrainCase, default_of
from parity.cases import Tier, cases_of
from parity.pipeline import Assignment

_ALIKE = ("layers", "bias", "dropout", "method")
"""In what a judge should be like what it judges."""
_EXACT_FIRST = ("lattice", "gaussian")


def with_judges(assignments: list[Assignment], tier: Tier, seed: int) -> list[Assignment]:
    """The assignments, and for each implementation what judges it unsharded where nothing chosen does."""
    added: list[Assignment] = []
    for implementation in dict.fromkeys(name for _, name in assignments):
        cases = [case for case, name in assignments if name == implementation]
        added += [(case, implementation) for case in _judges(cases, tier, seed)]
    return [*added, *assignments]


def _judges(cases: list[Case], tier: Tier, seed: int) -> list[Case]:
    judged = {_kind(case) for case in cases if not case.has_twin and _is_computed(case)}
    wanted = {_kind(case): case for case in cases if case.has_twin and _is_computed(case)}
    found: dict[str, Case] = {}
    for kind, case in wanted.items():
        if kind not in judged:
            judge = _nearest(case, tier, seed)
            found |= {judge.id: judge} if judge else {}
    return list(found.values())


def _is_computed(case: Case) -> bool:
    """What is made of files is another matter."""
    return not isinstance(case, MergeCase | ExchangeCase | RefuseCase)


def _kind(case: Case) -> tuple:
    """What one judge can speak for: the stored base and the compute dtype."""
    return case.subject, case.base, case.compute


def _nearest(case: Case, tier: Tier, seed: int) -> TrainCase | None:
    """An unsharded case of that kind: exact if there is one, as bounds may be too wide to show anything; then alike."""
    stacks = [other for other in cases_of(tier) if isinstance(other, TrainCase)]
    candidates = [dataclasses.replace(other, seed=seed) for other in stacks if _can_judge(other, case)]
    return min(candidates, key=lambda other: _rank(other, case), default=None)


def _can_judge(other: TrainCase, case: Case) -> bool:
    return _kind(other) == _kind(case) and other.strategy == UNSHARDED and other.inputs in _EXACT_FIRST


def _rank(other: TrainCase, case: Case) -> tuple:
    """A case without such a field is as one that says nothing of it."""
    wanted = {name: getattr(case, name, default_of(TrainCase, name)) for name in _ALIKE}
    differences = sum(getattr(other, name) != value for name, value in wanted.items())
    return _EXACT_FIRST.index(other.inputs), differences, len(other.id)
