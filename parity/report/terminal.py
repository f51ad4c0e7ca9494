"""The terminal view: progress while it runs, then what broke, then the verdict; plain lines in CI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from parity.checks.shard_check import Check
from parity.report.earned import account_of
from parity.report.environment import deviations
from parity.report.results import GROUPS, CaseResult, Results, worst_of
from parity.report.scales import show_scales
from parity.shard import describe_index

LINK_WORDS = {
    "algebra": "1 algebra     autodiff = closed form = differences = peft, in float64",
    "shards": "2 shards      each rank holds the slice of the unsharded result",
    "frameworks": "3 frameworks  unsharded torch matches the float64 oracle",
    "training": "4 training    steps, accumulation, clipping, resume",
    "controls": "5 controls    each planted bug makes a named check fail",
}
_SHOWN_CHECKS = 3
_SHOWN_CASES = 12
_PLAIN_EVERY = 25
"""Without a terminal, a line of progress each so many cases."""


def follow(results: Iterable[CaseResult], total: int, console: Console) -> Iterator[CaseResult]:
    """Show progress as the results come; failures at once."""
    return _follow_bar(results, total, console) if console.is_terminal else _follow_lines(results, total, console)


def _follow_bar(results: Iterable[CaseResult], total: int, console: Console) -> Iterator[CaseResult]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting the ranks", total=total)
        for result in results:
            progress.update(task, advance=1, description=escape(result.case.id))
            if result.status in {"failed", "error"}:
                progress.console.print(_headline(result))
            yield result


def _follow_lines(results: Iterable[CaseResult], total: int, console: Console) -> Iterator[CaseResult]:
    for number, result in enumerate(results, 1):
        if result.status in {"failed", "error"}:
            console.print(_headline(result), soft_wrap=True)
        if number % _PLAIN_EVERY == 0 or number == total:
            console.print(f"{number}/{total} cases, at {escape(result.case.id)}", soft_wrap=True)
        yield result


def _headline(result: CaseResult) -> str:
    what = result.reason or f"{sum(not check.passed for check in result.checks)} of {len(result.checks)} checks fail"
    return f"[red]{result.status.upper()}[/] {escape(f'{result.case.id} [{result.implementation}]: {what}')}"


def show(results: Results, console: Console) -> None:
    """The whole view after a run: what broke first, the verdict last, where one looks."""
    _show_failures(results, console)
    _show_links(results, console)
    _show_groups(results, console)
    show_scales(results, console)
    _show_earned(results, console)
    _show_remarks(results, console)
    console.print(verdict(results), soft_wrap=True)


def verdict(results: Results) -> str:
    """One sentence."""
    summary = results.summary()
    seconds = f"{results.seconds:.0f} s" if results.seconds is not None else "an unfinished run"
    independent = summary["by_group"]["independent"]
    counts = (
        f"{summary['cases']} cases, {independent} gradients and magnitudes against the reference,"
        f" {summary['checks']} checks in all that could have failed ({summary['vacuous']} vacuous apart),"
        f" {summary['failed']} failed, {summary['skipped']} skipped, {seconds}"
    )
    if results.holds:
        return f"[bold green]HOLDS[/]: {counts}"
    if results.seconds is None:
        return f"[bold yellow]INCOMPLETE[/]: {counts}"
    return f"[bold red]FALLS SHORT[/]: {counts}"


def _show_failures(results: Results, console: Console) -> None:
    broken = [result for result in results.cases if result.status in {"failed", "error"}]
    for result in broken[:_SHOWN_CASES]:
        console.print(f"\n{_headline(result)}", soft_wrap=True)
        if result.looks_like:
            console.print(f"  looks like [bold]{escape(result.looks_like)}[/]", soft_wrap=True)
        for check in worst_of(result.checks)[:_SHOWN_CHECKS]:
            console.print("  " + escape(describe_check(check, result)), soft_wrap=True)
        console.print(f"  replay: {escape(replay(result, results.tier))}", soft_wrap=True)
    if len(broken) > _SHOWN_CASES:
        console.print(f"\n... and {len(broken) - _SHOWN_CASES} more cases; --json has them all")


def replay(result: CaseResult, tier: str) -> str:
    """The command that runs this case again, for the same implementation and the same numbers."""
    if result.case.link == "controls":
        return f"dora-parity mutants -k {result.case.shape_name}"
    command = f"dora-parity run -k '{result.case.id}'"
    command += f" --impl {result.implementation}" if result.implementation != result.case.subject else ""
    command += f" --tier {tier}" if tier != "quick" else ""
    return command + (f" --seed {result.case.seed}" if result.case.seed else "")


AGAINST = {
    "oracle": "the reference",
    "twin": "the same run unsharded",
    "itself": "what it was before",
    "declared": "what the case declares",
    "layout": "the reference's layout",
    "whole": "the whole tensor",
    "refusal": "the refusal that is wanted",
    "mutant": "the mutant that must fail",
}
"""What an expectation rests on, in words."""


def describe_check(check: Check, result: CaseResult) -> str:
    """The tensor, rank and index range that broke, the clauses, got and want."""
    where = f"rank {check.rank}" if check.rank >= 0 else "all ranks"
    said = ", ".join(filter(None, (check.fault, check.mode and f"{check.mode} against {AGAINST[check.against]}")))
    line = f"{check.tensor} {check.kind}, step {check.step}, {where} {describe_index(check.index)}: {said}"
    if check.evidence:
        evidence = check.evidence
        line += f", at {list(evidence.at)} got {evidence.got:.9g}, want {evidence.want:.9g}"
        if check.limit:
            line += f", off by {check.worst:.3g}, limit {check.limit:.3g}"
    return f"{line} (clauses {' '.join(check.clauses or result.case.clauses)})"


def _show_links(results: Results, console: Console) -> None:
    by_link = results.summary()["by_link"]
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("link of the argument")
    for heading in ("cases", "checks", "vacuous", "failed"):
        table.add_column(heading, justify="right")
    for link, words in LINK_WORDS.items():
        cases = [result for result in results.cases if result.case.link == link]
        if not cases:
            continue
        vacuous = sum(bool(check.vacuous) for result in cases for check in result.checks)
        failed = sum(result.status in {"failed", "error"} for result in cases)
        table.add_row(words, str(len(cases)), str(by_link.get(link, 0)), str(vacuous), str(failed))
    console.print()
    console.print(table)


def _show_groups(results: Results, console: Console) -> None:
    """What the checks were of: first the ones that matter most."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("checks that could have failed, by what they compare")
    table.add_column("checks", justify="right")
    for group, count in results.by_group().items():
        if count:
            table.add_row(GROUPS[group], str(count))
    console.print()
    console.print(table)


def _show_earned(results: Results, console: Console) -> None:
    """Which of the claims a planted bug was seen to break, and what no case shows."""
    account = account_of(results.cases)
    if not account.claims:
        return
    console.print(
        f"\nearned: {len(account.clauses)} of {len(account.clauses) + len(account.bare)} clauses, by"
        f" {len(account.earned)} of {len(account.claims)} pairs of check and clause, where the clause's planted bug"
        f" was seen to fail; {account.stale} more were earned by other code, and count for nothing",
        highlight=False,
        soft_wrap=True,
    )
    if account.bare:
        console.print(f"claimed, and not earned: {' '.join(account.bare)}", soft_wrap=True, highlight=False)
    if account.idle:
        what = f"{len(account.idle)} functions that SPEC.md names are run by no case, and rest on tests alone"
        console.print(f"{what}: ref/SPEC.md lists them", soft_wrap=True, highlight=False)


def _show_remarks(results: Results, console: Console) -> None:
    reasons = Counter(result.reason for result in results.cases if result.status == "skipped")
    for reason, count in reasons.items():
        console.print(f"skipped {count}: {escape(reason)}", soft_wrap=True)
    vacuous = Counter(check.vacuous for result in results.cases for check in result.checks if check.vacuous)
    if vacuous:
        listed = ", ".join(f"{count} {why}" for why, count in vacuous.most_common())
        console.print(f"vacuous: {escape(listed)}", soft_wrap=True)
    for name in results.unjudged():
        console.print(f"[red]{escape(name)}: sharding alone was shown; nothing compares it with the reference[/]")
    if results.unproven_clauses():
        console.print(f"[red]no check bears on: {', '.join(results.unproven_clauses())}[/]", soft_wrap=True)
    worst = results.summary()["worst_ratio"]
    if worst is not None:
        console.print(f"worst error: {worst:.3f} x its bound")
    odd = deviations(results.environment)
    if odd:
        console.print(f"[yellow]not the recorded versions: {escape(', '.join(odd))}[/]", soft_wrap=True)
