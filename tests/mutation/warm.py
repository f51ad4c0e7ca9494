"""Runs a test or a case in a fork of a process that has loaded torch and JAX already, and nothing of the project.

Neither framework has computed anything here, so a fork is sound; what the child loads of the project is the copy's. The
processes that the child starts by `multiprocessing` are forks of this one too; only commands start afresh.
"""

import contextlib
import importlib
import itertools
import multiprocessing.context
import multiprocessing.util
import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NoReturn

import psutil

_LOADED = (
    *("numpy", "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"),
    *("torch.distributed.checkpoint", "transformers", "transformers.models.llama.modeling_llama", "safetensors.torch"),
    *("jax", "jax.numpy", "flax.nnx", "optax", "bitsandbytes", "peft", "hypothesis", "pytest", "beartype", "jaxtyping"),
    *("rich", "tyro", "jinja2"),
)
_ENVIRONMENT = {
    "MKL_CBWR": "AUTO,STRICT",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HYPOTHESIS_PROFILE": "ci",
}
_PYTEST = ("-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
_POLL_SECONDS = 0.05
_LOOKS = 10  # polls between two looks at which processes there are
_DESCRIPTORS = 1024


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    code: int | None
    """Its exit status; None where its time ran out."""
    seconds: float
    said: str
    """The end of what it wrote."""


def load() -> None:
    """Load what is slow to load. Call it once, before any run."""
    os.environ.update(_ENVIRONMENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def run(command: list[str], *, folder: Path, seconds: float, compile_files: bool) -> Ending:
    """Run `pytest ...` or `parity ...` in a child process in `folder`, for `seconds` at most.

    With `compile_files` it may leave compiled files for later runs, as the run without a mutant does.
    """
    start = time.monotonic()
    log = folder.parent / "run.log"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of every fork; it has started no thread here
        child = os.fork()
    if child == 0:
        _live(command, folder, log, compile_files=compile_files)
    code = _wait(child, start + seconds)
    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return Ending(code, time.monotonic() - start, said)


def _wait(child: int, deadline: float) -> int | None:
    """The child's status once it has ended, or None; no process that it started is left, also after an interrupt."""
    family: set[psutil.Process] = set()
    try:
        for poll in itertools.count():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            late = time.monotonic() > deadline
            if late or poll % _LOOKS == 0:
                with contextlib.suppress(psutil.Error):
                    family.update(psutil.Process(child).children(recursive=True))
            if late:
                break
            time.sleep(_POLL_SECONDS)
        return None
    finally:
        _end(family, child)


def _end(family: set[psutil.Process], child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _live(command: list[str], folder: Path, log: Path, *, compile_files: bool) -> NoReturn:
    """The child's life; it never returns into the parent's code."""
    code = 70
    try:
        os.setsid()
        _speak_into(log)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = not compile_files
        if not compile_files:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        _start_fork_server()
        code = _pytest(command[1:]) if command[0] == "pytest" else _parity(command[1:])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 - a mutant may raise anything
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _speak_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _start_fork_server() -> None:
    """Have ready what ranks are forked from: a fork of this process, in place of a new interpreter."""
    resource_tracker.ensure_running()
    new_interpreter = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = _forked
    try:
        forkserver.ensure_running()
    finally:
        multiprocessing.util.spawnv_passfds = new_interpreter
    server = multiprocessing.context.ForkServerProcess
    multiprocessing.context.SpawnProcess._Popen = staticmethod(server._Popen)


def _forked(_: object, arguments: list[str | bytes], descriptors: list[int]) -> int:
    """What `spawnv_passfds` does, without a new interpreter: the code is the last argument."""
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(BaseException):
        for number in set(range(3, _DESCRIPTORS)) - set(descriptors):
            with contextlib.suppress(OSError):  # most are not open
                os.close(number)
        exec(arguments[-1], {})  # noqa: S102 - multiprocessing's own code
    os._exit(0)


def _pytest(arguments: list[str]) -> int:
    import pytest  # noqa: PLC0415 - loaded before; the parent itself needs it not

    return int(pytest.main([*_PYTEST, *arguments]))


def _parity(arguments: list[str]) -> int:
    sys.argv = ["dora-parity", *arguments]
    runpy.run_module("parity", run_name="__main__", alter_sys=True)
    return 0
