"""`dora-parity run`: choose, run, show, write."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from parity.case import Case
from parity.checkpoint import CheckpointError
from parity.chosen import choose
from parity.cli import FELL_SHORT, HOLDS, RunOptions
from parity.controls import control_results
from parity.diagnosis import diagnose
from parity.environment import describe
from parity.errors import CannotRun, DeviceUnavailable
from parity.implementations.registry import check_exists
from parity.mutants import CONTROLS
from parity.pipeline import Assignment, Pipeline
from parity.pretrained import PretrainedUnavailable, cache_directory, locate
from parity.report.terminal import follow, show
from parity.results import CaseResult, Results, write_json


def run_suite(options: RunOptions, console: Console) -> int:
    """Run what the options choose.

    Raises:
        CannotRun: an option names what is not there.
    """
    cases = choose(options)
    _check_options(options)
    assignments = list(assign(cases, options.impl))
    model, no_model = find_model(cases, options.model)
    results = Results(environment=describe(options.device), tier=options.tier)
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
        if options.json:
            write_json(options.json, results.as_json())
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
    if not any(case.model == "pretrained" for case in cases):
        return None, ""
    try:
        model = locate(asked)
    except PretrainedUnavailable as error:
        return None, str(error)
    except CheckpointError as error:
        raise CannotRun(str(error)) from error
    return model, ""


def _check_options(options: RunOptions) -> None:
    for name in options.impl:
        check_exists(name)
    if options.device not in {"cpu", "cuda"}:
        raise DeviceUnavailable(f"--device {options.device!r} is unknown", hint="cpu or cuda")
    if options.json and options.json.is_dir():
        raise CannotRun(f"--json {options.json} is a directory", hint="name a file")


__all__ = ["CaseResult", "assign", "find_model", "run_suite"]
