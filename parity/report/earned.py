"""Which claims are earned: the clause's mutant was seen to fail in the same case and tensor, and its function to run.

A check may name a clause and be blind to it; only a failure shows that it sees. `dora-parity mutants --earn` writes
what it saw into `earned.json`, with digests of the cases, the mutants and the code that decides. An entry whose
digests no longer hold earns nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from parity.report.digests import case_digest, function_digests, judge_digest, mutant_digests, named_functions
from parity.report.results import CaseResult, write_json

SCHEMA = 1
Claim = tuple[str, str, str, str]
"""(clause, case, kind, tensor's last word) of checks that could have failed."""


@dataclass(frozen=True)
class Earned:
    """What was seen to fail, as far as it is still true."""

    fresh: frozenset[Claim] = frozenset()
    stale: frozenset[Claim] = frozenset()
    """Claims that were earned by other code, another mutant or another case of that name."""
    ran: frozenset[str] = field(default_factory=frozenset)
    """Functions of SPEC.md that some case of the quick tier ran, and that are what they were then."""


@dataclass(frozen=True)
class Account:
    """A run's claims, and those that are earned."""

    claims: frozenset[Claim]
    earned: frozenset[Claim]
    stale: int
    """Entries for these claims that earn nothing any more."""
    idle: tuple[str, ...]
    """Functions that SPEC.md names and that no case runs: tests alone show them."""

    @property
    def clauses(self) -> list[str]:
        """The earned clauses."""
        return in_order({claim[0] for claim in self.earned})

    @property
    def bare(self) -> list[str]:
        """Those that are claimed only."""
        return in_order({claim[0] for claim in self.claims} - {claim[0] for claim in self.earned})

    def as_json(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "clauses": self.clauses,
            "not_earned": self.bare,
            "claims": len(self.claims),
            "earned_claims": len(self.earned),
            "stale": self.stale,
            "run_by_tests_alone": list(self.idle),
        }


def account_of(results: Iterable[CaseResult]) -> Account:
    """What these results claim, against the committed file."""
    kept = read_earned({result.case.id: case_digest(result.case) for result in results})
    claims = frozenset(claim for result in results for claim in claims_of(result))
    idle = tuple(sorted(set(function_digests()) - kept.ran))
    return Account(claims, claims & kept.fresh, len(claims & kept.stale), idle)


def claims_of(result: CaseResult, *, failed: bool = False) -> set[Claim]:
    """What the counted checks of a case bear on; with `failed`, those alone that saw something wrong."""
    if result.case.link == "controls":
        return set()
    return {
        (clause, result.case.id, check.kind, check.tensor.rpartition(".")[2])
        for check in result.counted
        for clause in check.clauses
        if not (failed and check.passed)
    }


def read_earned(cases: dict[str, str]) -> Earned:
    """The committed file, against digests of the cases that are asked about."""
    kept = _committed()
    if kept.get("schema") != SCHEMA:
        return Earned()
    now = function_digests()
    ran = frozenset(name for name, digest in kept["functions"].items() if now.get(name) == digest)
    running = {clause for clause, names in named_functions().items() if ran.intersection(names)}
    mutants, fresh, stale = mutant_digests(), set(), set()
    for entry in kept["seen"]:
        case, mutant = entry["case"], entry["mutant"]
        holds = (
            kept["judge"] == judge_digest()
            and kept["mutants"][mutant] == mutants.get(mutant)
            and kept["cases"][case] == cases.get(case, kept["cases"][case])
        )
        for clause in entry["clauses"]:
            claims = {(clause, case, *seen.split(" ")) for seen in entry["failed"][clause]}
            (fresh if holds and clause in running else stale).update(claims)
    return Earned(frozenset(fresh), frozenset(stale - fresh), ran)


def write_earned(place: Path, seen: Iterable[tuple[str, CaseResult, tuple[str, ...]]], ran: Iterable[str]) -> None:
    """Keep what mutants made fail: (mutant, one of its results, the clauses that it violates) each."""
    entries, cases, mutants = [], {}, {}
    for mutant, result, clauses in seen:
        failed: dict[str, set[str]] = {}
        for clause, _, kind, leaf in claims_of(result, failed=True):
            if clause in clauses:
                failed.setdefault(clause, set()).add(f"{kind} {leaf}")
        if failed:
            cases[result.case.id] = case_digest(result.case)
            mutants[mutant] = mutant_digests()[mutant]
            words = {clause: sorted(failed[clause]) for clause in in_order(failed)}
            entries.append({"mutant": mutant, "case": result.case.id, "clauses": [*words], "failed": words})
    functions = {name: digest for name, digest in function_digests().items() if name in set(ran)}
    content = {
        "schema": SCHEMA,
        "judge": judge_digest(),
        "functions": functions,
        "mutants": mutants,
        "cases": cases,
        "seen": entries,
    }
    write_json(place, content)


def in_order(clauses: Iterable[str]) -> list[str]:
    """As SPEC.md has them, letter by letter and by number."""
    return sorted(clauses, key=lambda clause: (clause[0], int(clause[1:])))


@cache
def _committed() -> dict[str, Any]:
    """What the file says; nothing where there is none."""
    file = files("parity").joinpath("earned.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
