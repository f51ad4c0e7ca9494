"""The command line. Exit status: 0 holds, 1 fell short, 2 cannot run as asked, 130 by Ctrl-C, 143 by SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from parity.commands.options import CANNOT_RUN, HOLDS, INTERRUPTED, TERMINATED, RunOptions, Selection
from parity.errors import CannotRun
from parity.workers.family import ended_with_us

app = SubcommandApp()

_ABOUT = """Is this DoRA right, also when it is quantised and sharded?

Each case runs a DoRA implementation on one or more ranks and compares what every rank holds with the unsharded
mathematics: gradients, magnitudes, parameters after steps. Exit status: 0 all hold, 1 something fell short, 2 cannot
run as asked, 130 interrupted by Ctrl-C, 143 by SIGTERM.

Examples:
  dora-parity run                                   the quick tier, some two minutes on two cores
  dora-parity run -k 'fsdp2 and nf4' --world 2,4    a part of it
  dora-parity run --impl my_module:MyDora           your own implementation instead
  dora-parity mutants                               plant each known bug; each must be found
  dora-parity bench --json bench.json               what it costs, beside LoRA, peft and bitsandbytes
"""


@app.command(name="run")
def run(options: Annotated[RunOptions, tyro.conf.arg(name="")]) -> int:
    """Run cases and say whether the proof holds.

    Example: dora-parity run -k 'fsdp2 and nf4 and not pretrained' --json results.json
    """
    from parity.commands.run import run_suite  # noqa: PLC0415 - `list` and `--help` should not wait for it

    return run_suite(options, Console())


@app.command(name="list")
def list_cases(
    selection: Annotated[Selection, tyro.conf.arg(name="")],
    matrix: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """List the cases that `run` would run, one a line, with their clauses; --matrix: what is combined with what."""
    from parity.commands.choose import choose  # noqa: PLC0415

    if matrix:
        from parity.report.matrix import show_matrix  # noqa: PLC0415

        show_matrix(Console())
        return HOLDS

    cases = choose(selection)
    for case in cases:
        print(f"{case.id}  [{' '.join(case.clauses)}]")  # noqa: T201 - the output of the command
    print(f"{len(cases)} cases", file=sys.stderr)  # noqa: T201
    return HOLDS


@app.command(name="show")
def show(case: Annotated[Positional[str], arg(metavar="CASE")], tier: str = "full") -> int:
    """Show one case: every declared field, its inputs, and how to replay it. CASE is an identifier from `list`."""
    from parity.commands.choose import find  # noqa: PLC0415
    from parity.report.case_view import show_case  # noqa: PLC0415

    show_case(find(case, tier), Console())
    return HOLDS


@app.command(name="mutants")
def mutants(
    only: Annotated[str, arg(aliases=["-k"], metavar="NAME")] = "",
    json: Annotated[Path | None, arg(metavar="FILE")] = None,
    earn: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> int:
    """Plant each known bug in torch_impl and require that named checks fail; one that survives fails the command.

    --earn writes which check failed on which clause's bug, as parity/earned.json keeps it for `run` to read: do so
    when code that judges, a case or a bug has changed.

    Example: dora-parity mutants --earn parity/earned.json
    """
    from parity.commands.mutants import run_mutants  # noqa: PLC0415

    return run_mutants(only, json, Console(), earn=earn)


@app.command(name="bench")
def bench(
    only: Annotated[str, arg(aliases=["-k"], metavar="NAME")] = "",
    json: Annotated[Path | None, arg(metavar="FILE")] = None,
    plot: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> int:
    """Measure what correctness costs, against LoRA, peft and bitsandbytes; a ratio beyond its limit fails the command.

    Some ten minutes; leave the machine alone meanwhile. --only chooses rows whose name contains NAME; --json writes
    the rows, --plot draws them (.svg, .png).

    Example: dora-parity bench --json bench.json --plot bench.svg
    """
    from parity.bench.command import run_bench  # noqa: PLC0415

    return run_bench(only, json, plot, Console())


@app.command(name="gpu")
def gpu(
    part: Annotated[str, arg(metavar="{suite,codec,jax,bench,all}")] = "all",
    device: Annotated[str, arg(metavar="{cpu,cuda}")] = "cuda",
    json: Annotated[Path, arg(metavar="FILE")] = Path("results/gpu.json"),
    keep: Annotated[str, arg(aliases=["-k"], metavar="NAME")] = "",
) -> int:
    """Show what only a GPU can: the suite, bitsandbytes' kernels, the reference in JAX, and times, on the device.

    At most eight minutes a part. All that is found goes into one file; a part that is in it already is not run again.
    --device cpu runs all of it without a GPU, to see that it runs. --keep takes findings whose name contains NAME (of
    the suite: cases, by `run`'s expressions).

    Example: dora-parity gpu --part codec
    """
    from parity.gpu.command import run_parts  # noqa: PLC0415

    return run_parts(part, device, keep, json, Console())


class Terminated(KeyboardInterrupt):
    """SIGTERM: what happens at Ctrl-C happens too, and the exit status says which it was."""


def main() -> None:
    """Entry point: errors become one line, never a traceback; nothing that was started outlives the command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with ended_with_us():
            status = app.cli(prog="dora-parity", description=_ABOUT)
    except CannotRun as error:
        print(f"dora-parity: {error}", file=sys.stderr)  # noqa: T201
        status = CANNOT_RUN
    except Terminated:
        print("dora-parity: terminated; every rank has been ended", file=sys.stderr)  # noqa: T201
        status = TERMINATED
    except KeyboardInterrupt:
        print("dora-parity: interrupted; every rank has been ended", file=sys.stderr)  # noqa: T201
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone: nothing was shown to hold
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        status = INTERRUPTED
    sys.exit(status)


def _terminate(*_: object) -> None:
    """Once: a second signal must not stop the first one's tidying up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
