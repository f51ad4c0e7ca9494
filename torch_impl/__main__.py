"""The command line: `python -m torch_impl train|preflight|merge|export`, under torchrun for more than one process.

Exit status: 0 done (SIGTERM and Ctrl-C included, once saved), 1 it fell short, 2 it can't run as asked, 3 a watchdog
ended it, 130 interrupted twice.
"""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

VERBS = ("train", "preflight", "merge", "export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in VERBS:
        asked = not words or words[0] in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(f"usage: python -m torch_impl {{{','.join(VERBS)}}} [--help]\n")
        return 0 if words and asked else 2
    return _train(words[1:]) if words[0] == "train" else _alone(words[0], words[1:])


def fix_kernels() -> None:
    """T6: have MKL choose its kernels by shape alone, not by memory address; before its first call.

    FSDP1's views are unaligned: without this its bits, and those of a run that is resumed, depend on where they lie.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _train(words: list[str]) -> int:
    """Train, in this rank."""
    fix_kernels()
    import tyro  # noqa: PLC0415 - as below, after the usage line

    from torch_impl.errors import DoraError  # noqa: PLC0415
    from torch_impl.training import job  # noqa: PLC0415
    from torch_impl.training.options import TrainOptions, from_file  # noqa: PLC0415
    from torch_impl.training.train import train  # noqa: PLC0415

    place = job.seat()
    if place.world_size > 1 and not place.launched:
        sys.stderr.write(f"error: WORLD_SIZE is {place.world_size}, but torchrun didn't start this: use it\n")
        return 2
    try:
        given, words = _config(words)
        defaults = from_file(given) if given else {}
        flags = [*_as_flags(defaults), *words]
        out, err = (io.StringIO(), io.StringIO()) if place.rank else (sys.stdout, sys.stderr)  # one rank speaks
        with redirect_stdout(out), redirect_stderr(err):
            options = tyro.cli(TrainOptions, args=flags, prog="python -m torch_impl train")
    except DoraError as error:
        sys.stderr.write(f"error: {error}\n" if place.rank == 0 else "")
        return job.after_rank_0(place, 2)
    except SystemExit as done:
        return job.after_rank_0(place, 0 if done.code is None else int(done.code))
    try:
        with job.one_line(place), job.joined(place, phase_timeout=options.phase_timeout) as phases:
            train(options, phases, restarted=place.restart > 0)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted twice; --resume goes on from the last checkpoint\n")
        return 130
    return 0


def _alone(verb: str, words: list[str]) -> int:
    """The verbs of one process: judge a run that hasn't begun, merge or export what one has left."""
    from torch_impl.errors import DoraError  # noqa: PLC0415 - after the usage line
    from torch_impl.preflight.command import command  # noqa: PLC0415
    from torch_impl.training.export import export_command, merge_command  # noqa: PLC0415

    try:
        return {"preflight": command, "merge": merge_command, "export": export_command}[verb](words)
    except DoraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _config(words: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of the words."""
    at = next((at for at, word in enumerate(words) if word.partition("=")[0] == "--config"), None)
    if at is None:
        return None, words
    _, joined, path = words[at].partition("=")
    after = at + 1 if joined else at + 2
    return Path(path if joined else "".join(words[at + 1 : after])), words[:at] + words[after:]


def _as_flags(values: dict[str, object]) -> list[str]:
    """Options of a file as words of the command line, where later words win."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


if __name__ == "__main__":
    sys.exit(main())
