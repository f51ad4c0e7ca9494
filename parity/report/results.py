"""Results are a stream: a header, a record a case, a footer. All else (terminal, files, exit status) is derived.

A stream without its footer is incomplete, and says so. `--json` writes it whole, in the form of `results.schema.json`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from parity.case import Case
from parity.checks.shard_check import Check
from parity.shard import describe_index

SCHEMA = 1
Status = Literal["passed", "failed", "skipped", "error", "vacuous"]
"""`vacuous`: every check passed, and none of them could have failed."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What became of one case under one implementation."""

    case: Case
    implementation: str
    status: Status
    seconds: float
    checks: tuple[Check, ...] = ()
    reason: str = ""
    """Why it was skipped, or what went wrong before there was anything to check."""
    looks_like: str = ""
    """The known bug that the failure resembles, if any."""

    @property
    def counted(self) -> tuple[Check, ...]:
        """The checks that could have failed."""
        return tuple(check for check in self.checks if not check.vacuous)

    @property
    def claimed(self) -> set[str]:
        """The clauses that it must show: of this project's own implementations all that the case claims.

        A third party cannot be asked for all of them, as where it declares no units (S7): of it those that any check
        bears on.
        """
        if self.status == "skipped":
            return set()
        own = self.implementation == self.case.subject
        return set(self.case.clauses) if own else {clause for check in self.checks for clause in check.clauses}

    @property
    def clauses(self) -> set[str]:
        """The clauses that its counted checks bear on."""
        return {clause for check in self.counted for clause in check.clauses}


GROUPS = {
    "independent": "gradients and magnitudes against the reference",
    "observed": "outputs, losses, norms, state and parameters against it",
    "twin": "shards against the same run unsharded",
    "files": "stored bytes, files and refusals",
    "layout": "places of shards",
    "frozen": "what must not have changed, and what was declared",
    "mutant": "mutants that must fail",
}
"""Kinds of check, in words, in the order of their weight."""


ASIDE = ("layout", "frozen")
"""Groups that say nothing of what was computed: they never make a case pass by themselves."""


def _judges(check: Check) -> bool:
    """Whether it says of what was computed that it is right."""
    return check.against == "oracle" and group_of(check) not in ASIDE


def group_of(check: Check) -> str:
    """The first of `GROUPS` that a check belongs to."""
    if check.against in {"twin", "layout", "mutant"}:
        return check.against
    if check.against in {"itself", "declared"}:
        return "frozen" if check.kind != "output" else "independent"
    if check.kind in {"packed", "absmax", "decoded", "offset", "merged", "scaling", "refusal"}:
        return "files"
    leaf = check.tensor.rpartition(".")[2]
    if check.kind == "gradient" or leaf == "magnitude":
        return "independent"
    if check.kind == "parameter" and leaf not in {"lora_A", "lora_B"}:
        return "frozen"
    return "observed"


@dataclass
class Results:
    """The stream, as it grows."""

    environment: dict[str, str]
    tier: str
    cases: list[CaseResult] = field(default_factory=list)
    seconds: float | None = None
    """Set by the footer; None while the stream is incomplete."""

    @property
    def failed(self) -> int:
        """How many cases fell short: failed checks or errors."""
        return sum(result.status in {"failed", "error"} for result in self.cases)

    @property
    def checks(self) -> int:
        """Non-vacuous checks."""
        return sum(len(result.counted) for result in self.cases)

    def unproven_clauses(self) -> list[str]:
        """Clauses that some case claims and no non-vacuous check bears on."""
        own = [result for result in self.cases if result.case.link != "controls"]  # a planted bug proves no clause
        claimed = {clause for result in own for clause in result.claimed}
        shown = {clause for result in own for clause in result.clauses}
        return sorted(claimed - shown)

    def unjudged(self) -> list[str]:
        """Implementations that were compared with themselves alone: sharded as unsharded, right or wrong."""
        twin = {result.implementation for result in self.cases if any(c.against == "twin" for c in result.counted)}
        judged = {result.implementation for result in self.cases if any(_judges(check) for check in result.counted)}
        return sorted(twin - judged)

    @property
    def holds(self) -> bool:
        """Whether the run may exit 0: complete, nothing fell short, something was checked, no clause left bare."""
        complete = self.seconds is not None and self.checks > 0
        return complete and not self.failed and not self.unproven_clauses() and not self.unjudged()

    def by_group(self) -> dict[str, int]:
        """Counted checks by what they are of; first the ones that matter, against an expectation of other making."""
        counts = dict.fromkeys(GROUPS, 0)
        counts.update(Counter(group_of(check) for result in self.cases for check in result.counted))
        return counts

    def summary(self) -> dict[str, Any]:
        """The counts."""
        by_clause: Counter[str] = Counter()
        by_link: Counter[str] = Counter()
        for result in self.cases:
            by_link[result.case.link] += len(result.counted)
            by_clause.update(clause for check in result.counted for clause in check.clauses)
        every = [check for result in self.cases for check in result.checks]
        ratios = [check.ratio for check in every if check.ratio is not None and check.mode in {"bound", "norm"}]
        return {
            "cases": len(self.cases),
            "checks": self.checks,
            "vacuous": sum(bool(check.vacuous) for check in every),
            "failed": self.failed,
            "skipped": sum(result.status == "skipped" for result in self.cases),
            "all_vacuous": sum(result.status == "vacuous" for result in self.cases),
            "by_group": self.by_group(),
            "worst_ratio": max(ratios, default=None),
            "unproven_clauses": self.unproven_clauses(),
            "unjudged": self.unjudged(),
            "by_link": dict(by_link),
            "by_clause": dict(sorted(by_clause.items())),
        }

    def as_json(self) -> dict[str, Any]:
        """The whole stream in the stable form."""
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "tier": self.tier,
            "complete": self.seconds is not None,
            "seconds": self.seconds,
            "summary": self.summary(),
            "cases": [_case_as_json(result) for result in self.cases],
        }


def _case_as_json(result: CaseResult) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": result.case.id,
        "link": result.case.link,
        "implementation": result.implementation,
        "world": result.case.world,
        "clauses": list(result.case.clauses),
        "seconds": round(result.seconds, 4),
        "status": result.status,
        "checks": [_check_as_json(check) for check in result.checks],
    }
    entry |= {"reason": result.reason} if result.reason else {}
    entry |= {"looks_like": result.looks_like} if result.looks_like else {}
    return entry


def _check_as_json(check: Check) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "tensor": check.tensor,
        "kind": check.kind,
        "step": check.step,
        "rank": check.rank,
        "index": describe_index(check.index),
        "mode": check.mode or "none",
        "against": check.against,
        "clauses": list(check.clauses),
        "worst": _finite(check.worst),
        "limit": _finite(check.limit),
        "ratio": check.ratio,
        "passed": check.passed,
    }
    entry |= {"fault": check.fault} if check.fault else {}
    entry |= {"detects": check.detects} if check.detects is not None and check.detects < float("inf") else {}
    entry |= {"vacuous": check.vacuous} if check.vacuous else {}
    if check.evidence:
        evidence = check.evidence
        entry["evidence"] = {"at": list(evidence.at), "got": _finite(evidence.got), "want": _finite(evidence.want)}
    return entry


def _finite(number: float) -> float | None:
    """JSON has no infinity and no NaN; both become null."""
    return number if abs(number) < float("inf") else None


def write_json(path: Path, content: Any) -> None:
    """Write aside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            json.dump(content, stream, allow_nan=False)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def worst_of(checks: Iterable[Check]) -> list[Check]:
    """Failed checks, those furthest off first."""
    return sorted((check for check in checks if not check.passed), key=lambda check: -(check.ratio or float("inf")))
