"""A run under torchrun that something happens to: start it, wait for a line, act, see how it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PATIENCE = 25.0
"""How many seconds processes of a job that has ended may take to end too: far fewer on an idle machine."""


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    status: int
    seconds: float
    """From the act to the end of the launcher."""
    lines: list[str]
    orphans: list[int]
    """Processes of the job that were still there PATIENCE later."""
    victim: int
    """The process that was acted on."""


def command(words: list[str], *, world: int, restarts: int = 0) -> list[str]:
    """Give torchrun with our module; a lone process without it."""
    module = ["-m", "torch_impl", "train", *words]
    if world == 0:
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    return [sys.executable, *torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *module]


def watch(words: list[str], *, until: str, act: Callable[[int, dict[int, int]], int]) -> Callable[..., Ending]:
    """Make a job that runs until a line holds `until`, then `act(launcher, ranks)`; it returns whom it acted on."""

    def run(log: Path, *, world: int, restarts: int = 0) -> Ending:
        with _started(command(words, world=world, restarts=restarts), log) as job:
            deadline = time.monotonic() + 90
            while until not in log.read_text():
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            family = psutil.Process(job.pid).children(recursive=True)
            while not until and len(_ranks(family)) < world:
                assert time.monotonic() < deadline, log.read_text()
                family = psutil.Process(job.pid).children(recursive=True)
            start = time.monotonic()
            victim = act(job.pid, _ranks(family))
            status = job.wait(90)
            seconds = time.monotonic() - start
            _, alive = psutil.wait_procs(family, timeout=PATIENCE)
            orphans = [process.pid for process in alive]
            for process in alive:
                process.kill()
            return Ending(status, seconds, log.read_text().splitlines(), orphans, victim)

    return run


@contextlib.contextmanager
def _started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job whose output goes to a file; where the test fails meanwhile, nothing of it is left running."""
    with log.open("w") as output:
        job = subprocess.Popen(  # noqa: S603 - our own words
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
    try:
        yield job
    except BaseException:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(job.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        job.wait()
        raise


def _ranks(family: list[psutil.Process]) -> dict[int, int]:
    """Process identifiers by rank."""
    found = {}
    for process in family:
        try:
            if "torch_impl" in process.cmdline():
                found[int(process.environ()["RANK"])] = process.pid
        except (psutil.Error, KeyError):
            continue
    return found


def kill_rank(rank: int, number: int = signal.SIGKILL) -> Callable[[int, dict[int, int]], int]:
    """Signal one rank."""

    def act(_: int, ranks: dict[int, int]) -> int:
        os.kill(ranks[rank], number)
        return ranks[rank]

    return act


def kill_in_the_load(rank: int) -> Callable[[int, dict[int, int]], int]:
    """Kill one rank while it has a file of weights open: it is stopped each time to see whether it has.

    Begin when the ranks are there: no line of rank 0 comes surely before the load of rank 1.
    """

    def act(_: int, ranks: dict[int, int]) -> int:
        watched = psutil.Process(ranks[rank])
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            watched.suspend()
            if any(file.path.endswith("/model.safetensors") for file in watched.open_files()):
                watched.kill()
                return watched.pid
            watched.resume()
            time.sleep(0.005)
        raise AssertionError("no load was caught under way")

    return act


def kill_in_a_collective(rank: int) -> Callable[[int, dict[int, int]], int]:
    """Kill one rank while it waits for the other, which has been stopped and so can't answer."""

    def act(_: int, ranks: dict[int, int]) -> int:
        victim, other = ranks[rank], ranks[1 - rank]
        os.kill(other, signal.SIGSTOP)
        while not _sleeps(victim):
            time.sleep(0.05)
        os.kill(victim, signal.SIGKILL)
        os.kill(other, signal.SIGCONT)
        return victim

    return act


def kill_beside_one_that_joins(rank: int) -> Callable[[int, dict[int, int]], int]:
    """Kill one rank before it has begun, when the other waits for it already."""

    def act(_: int, ranks: dict[int, int]) -> int:
        victim, other = ranks[rank], psutil.Process(ranks[1 - rank])
        os.kill(victim, signal.SIGSTOP)
        while not other.children():  # its recorder
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(victim, signal.SIGKILL)
        return victim

    return act


def terminate_with_one_stopped(rank: int) -> Callable[[int, dict[int, int]], int]:
    """SIGTERM to the launcher while one rank is stopped and the other waits for it in a collective."""

    def act(launcher: int, ranks: dict[int, int]) -> int:
        os.kill(ranks[rank], signal.SIGSTOP)
        while not _sleeps(ranks[1 - rank]):
            time.sleep(0.05)
        os.kill(launcher, signal.SIGTERM)
        return ranks[rank]

    return act


def _sleeps(process: int) -> bool:
    """Whether none of its threads has used the processor for half a second."""
    watched = psutil.Process(process)
    before = watched.cpu_times()
    time.sleep(0.5)
    return watched.cpu_times()[:2] == before[:2]


def kill_in_a_save(rank: int, folder: Path) -> Callable[[int, dict[int, int]], int]:
    """Kill one rank while a checkpoint lies half-written: all are stopped first, to see that it still does."""

    def act(_: int, ranks: dict[int, int]) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(folder.glob(".writing-*")):
                for process in ranks.values():
                    os.kill(process, signal.SIGSTOP)
                caught = any(folder.glob(".writing-*"))
                if caught:
                    os.kill(ranks[rank], signal.SIGKILL)
                for process in ranks.values():
                    os.kill(process, signal.SIGCONT)
                if caught:
                    return ranks[rank]
        raise AssertionError("no save was caught under way")

    return act


def signal_launcher(number: int) -> Callable[[int, dict[int, int]], int]:
    """Signal torchrun, or the lone process."""

    def act(launcher: int, _: dict[int, int]) -> int:
        os.kill(launcher, number)
        return launcher

    return act
