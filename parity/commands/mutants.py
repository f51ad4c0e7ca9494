"""Link 5: each known bug, planted, makes named checks fail. A suite that has not failed proves nothing.

A mutant is killed when every (kind, tensor) that its plan names has at least one failed check. A rank that raises
or dies with the bug in it is no kill: the check must have seen the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from parity.bugs.known import BUGS
from parity.case import ControlCase
from parity.cases import cases_of
from parity.checks.shard_check import Check
from parity.commands.expression import compile_expression
from parity.errors import CannotRun, NoCaseMatches
from parity.models.pretrained import PretrainedUnavailable, cache_directory, locate
from parity.pipeline import Pipeline
from parity.report.earned import write_earned
from parity.report.results import CaseResult, write_json
from parity.report.terminal import follow


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    name: str
    wanted: tuple[tuple[str, str], ...]
    failed: frozenset[tuple[str, str]]
    """(kind, tensor's last word) of the checks that failed."""
    results: tuple[CaseResult, ...]

    @property
    def missed(self) -> list[tuple[str, str]]:
        """What should have failed and did not."""
        return [pair for pair in self.wanted if pair not in self.failed]

    @property
    def killed(self) -> bool:
        """Whether every named check failed."""
        return not self.missed

    @property
    def named(self) -> str:
        """The first check that saw it, in words."""
        for result in self.results:
            for check in result.checks:
                if not check.passed and (check.kind, check.tensor.rpartition(".")[2]) in self.wanted:
                    return f"{check.tensor} {check.kind}, step {check.step}, rank {check.rank} in {result.case.id}"
        return "; ".join(result.reason for result in self.results if result.reason) or "nothing failed"


def try_mutant(name: str, pipeline: Pipeline) -> Verdict:
    """Run one mutant on its cases."""
    plan = BUGS[name]
    matches = compile_expression(plan.keep)
    cases = [case for case in cases_of("quick") if case.subject == plan.subject and matches(case)]
    results = tuple(pipeline.run((case, f"mutant:{name}") for case in cases))
    failed = frozenset(
        (check.kind, check.tensor.rpartition(".")[2])
        for result in results
        for check in result.checks
        if not check.passed
    )
    return Verdict(name, plan.kills, failed, results)


def control_results(names: Iterable[str], pipeline: Pipeline) -> Iterator[CaseResult]:
    """Mutants as cases of link 5: one check for each (kind, tensor) that must fail."""
    for name in names:
        verdict = try_mutant(name, pipeline)
        checks = tuple(_control_check(pair, verdict) for pair in verdict.wanted)
        yield CaseResult(
            case=control_case(name),
            implementation=f"mutant:{name}",
            status="passed" if verdict.killed else "failed",
            seconds=sum(result.seconds for result in verdict.results),
            checks=checks,
            reason="" if verdict.killed else f"{name} survives: {verdict.named}",
        )


def control_case(name: str) -> ControlCase:
    """A case that stands for a mutant in the results."""
    return ControlCase(shape_name=name, clauses=BUGS[name].clauses)


def _control_check(pair: tuple[str, str], verdict: Verdict) -> Check:
    seen = pair in verdict.failed
    return Check(
        tensor=pair[1],
        kind=pair[0],
        step=0,
        rank=-1,
        index=(),
        mode="",
        fault="" if seen else "no check fails on it",
        against="mutant",
        worst=0.0 if seen else 1.0,
        limit=0.0,
        ratio=0.0 if seen else None,
        passed=seen,
    )


def run_mutants(only: str, json: Path | None, console: Console, *, earn: Path | None = None) -> int:
    """`dora-parity mutants`: try all, or those whose name has `only` in it; with `earn` write what they made fail.

    Raises:
        NoCaseMatches: no mutant is called that.
        CannotRun: a part of the mutants earns nothing for the rest.
    """
    if earn and only:
        raise CannotRun(f"--earn keeps what all mutants made fail, and -k {only!r} leaves some out", hint="drop one")
    names = [name for name in BUGS if only.lower() in name.lower()]
    if not names:
        raise NoCaseMatches(f"no mutant has {only!r} in its name", hint=f"they are {', '.join(BUGS)}")
    verdicts = []
    with Pipeline(cache=cache_directory(), model=_model() if earn else None, notes_calls=bool(earn)) as pipeline:
        for name in names:
            verdict = try_mutant(name, pipeline)
            verdicts.append(verdict)
            _show(verdict, console)
        if earn:
            _earn(earn, verdicts, pipeline, console)
    survivors = [verdict.name for verdict in verdicts if not verdict.killed]
    if json:
        write_json(json, {"schema": 1, "mutants": [_as_json(verdict) for verdict in verdicts]})
    console.print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} mutants killed", highlight=False)
    if survivors:
        console.print(f"[bold red]SURVIVE[/]: {', '.join(survivors)}", soft_wrap=True)
    return 1 if survivors else 0


def _earn(place: Path, verdicts: list[Verdict], pipeline: Pipeline, console: Console) -> None:
    """Let the quick tier run once, for the functions that it calls, and keep all of it."""
    console.print("the quick tier, for the functions of the specification that it calls", highlight=False)
    assignments = [(case, case.subject) for case in cases_of("quick")]
    results = [*follow(pipeline.run(assignments), len(assignments), console)]
    broken = [result for result in results if result.status in {"failed", "error"}]
    if broken:
        raise CannotRun(f"{broken[0].case.id}: {broken[0].status} without any bug", hint="mend that first")
    seen = [(v.name, result, BUGS[v.name].clauses) for v in verdicts for result in v.results]
    write_earned(place, seen, pipeline.ran())


def _model() -> Path | None:
    """The pretrained checkpoint, if there is one."""
    try:
        return locate(None)
    except PretrainedUnavailable:
        return None


def _show(verdict: Verdict, console: Console) -> None:
    word = "[green]killed[/]  " if verdict.killed else "[red]SURVIVES[/]"
    console.print(f"{word} {verdict.name:26} {escape(BUGS[verdict.name].bug)}", soft_wrap=True, highlight=False)
    console.print(f"         by {escape(verdict.named)}", soft_wrap=True, highlight=False)
    if verdict.missed:
        missed = ", ".join(f"{kind} of {tensor}" for kind, tensor in verdict.missed)
        console.print(f"         [red]no check fails on: {missed}[/]", soft_wrap=True, highlight=False)


def _as_json(verdict: Verdict) -> dict:
    bug = BUGS[verdict.name]
    flag = {field: getattr(bug, field) for field in ("name", "bug", "effect", "source", "clauses")}
    return {**flag, "killed": verdict.killed, "failed": sorted(map(list, verdict.failed)), "named": verdict.named}
