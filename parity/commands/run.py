"""`dora-parity run`: choose, run, show, write."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from parity.bugs.diagnosis import diagnose
from parity.bugs.known import CONTROLS
from parity.case import Case, NetworkCase
from parity.commands.choose import choose
from parity.commands.judge import with_judges
from parity.commands.mutants import control_results
from parity.commands.options import FELL_SHORT, HOLDS, RunOptions
from parity.errors import CannotRun, DeviceUnavailable, NoCaseMatches
from parity.implementations.registry import check_exists
from parity.models.pretrained import PretrainedUnavailable, cache_directory, locate, token_ids
from parity.pipeline import Assignment, Pipeline
from parity.report.earned import account_of
from parity.report.environment import describe
from parity.report.results import Results, write_json
from parity.report.terminal import follow, show


def run_suite(options: RunOptions, console: Console) -> int:
    """Run what the options choose.

    Raises:
        CannotRun: an option names what is not there.
    """
    cases = choose(options)
    _check_options(options)
    assignments = list(assign(cases, options.impl))
    if not assignments:
        raise NoCaseMatches("--impl takes the place of torch_impl, whose cases -k leaves out", hint="choose others")
    chosen, assignments = assignments, with_judges(assignments, options.tier, options.seed)
    model, no_model = find_model(cases, options.model)
    if len(assignments) > len(chosen):
        more = len(assignments) - len(chosen)
        console.print(f"{more} unsharded cases added: what is only compared with itself is not known to be right")
    results = Results(environment=describe(options.device), tier=options.tier)
    _write(options.json, results)  # before anything runs: a place that cannot be written is known at once
    start = time.monotonic()
    try:
        with Pipeline(device=options.device, model=model, no_model=no_model, cache=cache_directory()) as pipeline:
            controls = CONTROLS if wants_controls(options) else ()
            stream = itertools.chain(control_results(controls, pipeline), pipeline.run(assignments))
            for result in follow(stream, len(controls) + len(assignments), console):
                results.cases.append(diagnose(result))
                if options.fail_fast and result.status in {"failed", "error"}:
                    break
            else:
                results.seconds = time.monotonic() - start
    finally:  # also after Ctrl-C: what was found is not lost, and has no footer
        _write(options.json, results)
    show(results, console)
    return HOLDS if results.holds else FELL_SHORT


def assign(cases: list[Case], implementations: tuple[str, ...]) -> Iterator[Assignment]:
    """Each case with its subject; `--impl` replaces `torch_impl` and leaves out the cases of other subjects."""
    if not implementations:
        yield from ((case, case.subject) for case in cases)
        return
    ours = [case for case in cases if case.subject == "torch_impl"]
    yield from itertools.product(ours, implementations)


def wants_controls(options: RunOptions) -> bool:
    """Link 5 belongs to a whole run of this project's own implementation."""
    return not (options.impl or options.keep or options.world)


def find_model(cases: list[Case], asked: Path | None) -> tuple[Path | None, str]:
    """The pretrained checkpoint, or why there is none; nothing is fetched where no case wants it.

    Raises:
        CannotRun: `--model` names no sound checkpoint.
    """
    if not any(isinstance(case, NetworkCase) for case in cases):
        return None, ""
    try:
        model = locate(asked)
    except PretrainedUnavailable as error:
        return None, str(error)
    if asked:
        token_ids(model, max(case.tokens for case in cases))  # a tokenizer that does not fit is known at once
    return model, ""


def _check_options(options: RunOptions) -> None:
    for name in options.impl:
        check_exists(name)
    if options.device not in {"cpu", "cuda"}:
        raise DeviceUnavailable(f"--device {options.device!r} is unknown", hint="cpu or cuda")
    if options.device == "cuda" and not _cuda_is_there():
        raise DeviceUnavailable("--device cuda: torch finds no CUDA device here", hint="use --device cpu")
    if options.json and options.json.exists() and not options.json.is_file():
        raise CannotRun(f"--json {options.json} is no file (a directory or a device)", hint="name a file")


def _cuda_is_there() -> bool:
    """Asked of a process of its own, since only ranks load torch."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0  # noqa: S603


def _write(place: Path | None, results: Results) -> None:
    """Write the stream as far as it came.

    Raises:
        CannotRun: the place cannot be written.
    """
    if place:
        try:
            write_json(place, results.as_json() | {"earned": account_of(results.cases).as_json()})
        except OSError as error:
            raise CannotRun(f"--json {place} cannot be written: {error.strerror}", hint="name another file") from error
