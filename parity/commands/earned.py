"""Which clauses are earned: a check that names the clause was seen to fail where the clause's mutant was tried.

A check may name a clause and be blind to it. Only a failure shows that it sees.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from parity.bugs.known import BUGS
from parity.cases import cases_of
from parity.report.results import CaseResult

Earned = dict[str, list[tuple[str, str, str, str]]]
"""By clause: (mutant, case, kind, tensor's last word) of each check that failed."""


def earned_by(name: str, results: Iterable[CaseResult]) -> Earned:
    """What one mutant's failures earn: of its own clauses those that the failed checks name."""
    seen: dict[str, set[tuple[str, str, str, str]]] = {}
    for result in results:
        for check in result.checks:
            for clause in set(BUGS[name].clauses) & set(check.clauses) if not check.passed else ():
                place = (name, result.case.id, check.kind, check.tensor.rpartition(".")[2])
                seen.setdefault(clause, set()).add(place)
    return {clause: sorted(places) for clause, places in seen.items()}


def together(parts: Iterable[Earned]) -> Earned:
    """All mutants' together, by clause."""
    whole: Earned = {}
    for part in parts:
        for clause, places in part.items():
            whole.setdefault(clause, []).extend(places)
    return dict(sorted(whole.items(), key=lambda item: (item[0][0], int(item[0][1:]))))


def show_earned(earned: Earned, console: Console) -> None:
    """How many clauses of the quick tier are earned, and which rest on checks that no mutant was tried on."""
    claimed = {clause for case in cases_of("quick") for clause in case.clauses}
    bare = sorted(claimed - set(earned), key=lambda clause: (clause[0], int(clause[1:])))
    places = sum(len(places) for places in earned.values())
    console.print(
        f"{len(earned)} of {len(claimed)} clauses earned, by {places} kinds of check that a mutant made fail",
        highlight=False,
    )
    if bare:
        console.print(f"claimed, and tried by no mutant: {' '.join(bare)}", soft_wrap=True, highlight=False)
