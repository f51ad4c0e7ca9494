"""Plants small wrong changes in `torch_impl` and `ref`, one at a time, and reports those that nothing notices.

`plan.toml` says which files, and which cases and tests cover each; `equivalent.toml` lists the changes that change
nothing, each with its proof. Exits with 1 where a survivor is not listed (with --changed: on a changed line).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import warm
from chart import Chart
from copies import Copy
from operators import Mutant, mutants_of
from report import Report, read_equivalents
from sampling import Lines, changed_lines, in_order
from trials import Outcome, PlanFailsError, Trials, append_outcome, plan, read_outcomes

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="how many mutants to try, 0 for all (default: 400)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="changes the sample")
    parser.add_argument("--file", action="append", default=[], metavar="PART", help="only files with this in the path")
    parser.add_argument("--changed", metavar="REV", help="first the lines that REV has not; only these decide")
    parser.add_argument("--resume", action="store_true", help="go on where the results file ends")
    parser.add_argument("--survivors", action="store_true", help="try the results file's survivors again, only these")
    parser.add_argument("--tests-first", action="store_true", help="run tests before cases")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "mutation.jsonl", help="one line a mutant")
    parser.add_argument(
        "--map", type=Path, default=ROOT / "results" / "mutation-map.jsonl", help="which test runs what"
    )
    parser.add_argument("--list-tests", action="store_true", help="only print the test files that the map is made of")
    return parser.parse_args()


def main() -> int:
    """Try mutants and report."""
    options = _arguments()
    steps = plan(HERE / "plan.toml")
    if options.list_tests:
        _show(
            " ".join(
                sorted(
                    {test for own in steps.values() for step in own if step.kind == "test" for test in step.arguments}
                )
            )
        )
        return 0
    files = [file for file in steps if not options.file or any(part in file for part in options.file)]
    mutants = [mutant for file in files for mutant in mutants_of(file, (ROOT / file).read_bytes())]
    changed = _changed(options.changed) if options.changed else None
    chosen = in_order(mutants, seed=options.seed, changed=changed or {})[: options.count or None]
    known = {outcome.key: outcome for outcome in read_outcomes(options.results)}
    if options.survivors:
        chosen = [mutant for mutant in mutants if mutant.key in known]
        known = {key: outcome for key, outcome in known.items() if outcome.killed_by}
    elif options.resume:
        _show(f"{sum(mutant.key in known for mutant in chosen)} of {len(chosen)} are known already")
    else:
        options.results.unlink(missing_ok=True)
        known = {}
    try:
        outcomes = tuple(_outcomes(chosen, known, steps, options))
    except PlanFailsError as error:
        _show(f"nothing can be said of mutants: {error}")
        return 2
    report = Report(len(mutants), outcomes, read_equivalents(HERE / "equivalent.toml"), changed)
    for line in report.lines():
        _show(line)
    return 1 if report.blocking else 0


def _changed(revision: str) -> Lines:
    """The changed lines; none, and a word about it, where git does not know the revision."""
    try:
        return changed_lines(ROOT, revision)
    except LookupError as error:
        _show(f"no lines count as changed: {error}")
        return {}


def _outcomes(chosen: list[Mutant], known: dict, steps: dict, options: argparse.Namespace) -> list[Outcome]:
    """What became of each, until the time is over."""
    began = time.monotonic()
    outcomes = [known[mutant.key] for mutant in chosen if mutant.key in known]
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        warm.load()
        trials = Trials(Copy(ROOT, Path(folder) / "copy"), steps, Chart(options.map, ROOT), options.tests_first)
        for mutant in chosen:
            if time.monotonic() - began > options.seconds:
                break
            if mutant.key not in known:
                outcome = trials.try_mutant(mutant)
                append_outcome(options.results, outcome)
                outcomes.append(outcome)
                _show(_told(outcome))
    return outcomes


def _told(outcome: Outcome) -> str:
    how = f"killed by {outcome.killed_by}" if outcome.killed_by else "SURVIVES"
    return f"{how:15} {outcome.seconds:6.1f} s  {outcome.file}:{outcome.line} {outcome.kind}"


def _show(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the output of the command


if __name__ == "__main__":
    sys.exit(main())
