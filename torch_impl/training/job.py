"""A run's processes: find the peers, stop when asked, end with the launcher, speak once.

One process needs no launcher; more come from torchrun, whose environment variables are read here and nowhere else.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from torch_impl.errors import DoraError, PeerLostError
from torch_impl.training.phases import STOPS, Phases
from torch_impl.training.recorder import Recorder

_PR_SET_PDEATHSIG = 1
_REACH = 8.0
"""Seconds to reach the launcher's store: it is there before any rank is, so one that can't be reached is gone."""


_PATIENCE = 20.0
"""Seconds for rank 0 to speak first: hosts import torch in unlike times."""


@dataclass(frozen=True)
class Seat:
    """Where this process sits, as the launcher says."""

    rank: int
    local_rank: int
    world_size: int
    launched: bool
    """Whether torchrun started it."""
    restart: int
    """How often torchrun has started these ranks anew."""
    restarts_left: bool


def seat() -> Seat:
    """Read torchrun's environment; a lone process is rank 0 of 1."""
    number = {key: int(os.environ.get(key, default)) for key, default in _VARIABLES.items()}
    return Seat(
        rank=number["RANK"],
        local_rank=number["LOCAL_RANK"],
        world_size=number["WORLD_SIZE"],
        launched="TORCHELASTIC_RUN_ID" in os.environ,
        restart=number["TORCHELASTIC_RESTART_COUNT"],
        restarts_left=number["TORCHELASTIC_RESTART_COUNT"] < number["TORCHELASTIC_MAX_RESTARTS"],
    )


_VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
}


@contextmanager
def joined(place: Seat, *, phase_timeout: float) -> Iterator[Phases]:
    """The process group and the phases of a run, until the body ends.

    Raises:
        PeerLostError: a collective failed.
        DoraError: what the body raised, once it has been printed by the first rank that met it.
    """
    recorder = Recorder(
        rank=place.rank,
        host=socket.gethostname(),
        launcher=os.getppid(),
        waits=place.launched and not place.restarts_left,
        speaks_for_launcher=place.local_rank == 0,
    )
    phases = Phases(rank=place.rank, world_size=place.world_size, limit=phase_timeout, recorder=recorder)
    try:
        if place.launched:
            _end_with_parent()
        with _stopping_when_asked(phases, launched=place.launched):
            phases.watch()
            _join(place, phases)
            yield phases
            with suppress(RuntimeError):
                distributed.destroy_process_group()
    finally:
        recorder.end()


def _end_with_parent() -> None:
    """A killed torchrun leaves its workers: have the kernel end them with it."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _stopping_when_asked(phases: Phases, *, launched: bool) -> Iterator[None]:
    """SIGTERM and Ctrl-C only ask: the loop saves and ends at its next step. A lone process obeys a second Ctrl-C.

    A rank that waits in a collective runs no handler, so the watchdog hears of the signal through a pipe.
    """

    def ask(number: int, _: object) -> None:
        if number == signal.SIGINT and phases.stop_requested_at and not launched:  # torchrun passes on a first one
            raise KeyboardInterrupt
        phases.stop_requested_at = phases.stop_requested_at or time.monotonic()

    reads, writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    phases.signals = reads
    for number in STOPS:
        signal.signal(number, ask)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        phases.end_watch()
        os.close(reads)
        os.close(writes)


def _join(place: Seat, phases: Phases) -> None:
    """Form the process group, and exchange who is who.

    torchrun keeps one store over all restarts, and gloo would find the addresses of ranks that are gone: so each start
    has keys of its own.
    """
    limit = timedelta(seconds=phases.limit + 30)  # the watchdog, which explains, comes first
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    if not place.launched:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    _refuse_unreachable(place)
    store = _store(place, timeout=limit)
    store.set(f"who/{place.rank}", f"{os.getpid()} {socket.gethostname()}")
    words = [store.get(f"who/{rank}").decode().split(" ", 1) for rank in range(place.world_size)]
    phases.peers = tuple((int(process), host) for process, host in words)
    phases.store = _store(place, timeout=limit)
    phases.store.set_timeout(timedelta(seconds=10))  # of a question; on a busy machine a new connection may take longer
    distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=limit)


def _refuse_unreachable(place: Seat) -> None:
    """A rank that was still importing when torchrun was killed has no parent to end with, and no store to wait for.

    Raises:
        PeerLostError: nothing listens where the launcher's store should.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # rank 0 will serve it
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + _REACH
    while True:
        try:
            socket.create_connection((host, port), timeout=_REACH).close()
        except OSError as problem:
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"rank {place.rank} can't reach the launcher's store at {host}:{port}: {problem}",
                    hint="torchrun is gone, or this host can't reach that one",
                ) from None
            time.sleep(0.5)
        else:
            return


def _store(place: Seat, *, timeout: timedelta) -> Any:
    """A new connection to the launcher's store, with the keys of this start."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = distributed.TCPStore(host, port, is_master=serves, timeout=timeout, multi_tenant=True)
    return distributed.PrefixStore(f"dora/{place.restart}", store)


def after_rank_0(place: Seat, status: int) -> int:
    """A status, late: torchrun ends all ranks at the first that fails, and rank 0 has something to say.

    Rank 0's own end is what ends this wait, by torchrun's SIGTERM.
    """
    if place.rank and status:
        time.sleep(_PATIENCE)
    return status


@contextmanager
def one_line(place: Seat) -> Iterator[None]:
    """What the body refuses becomes one line, printed by the first rank that meets it, and exit status 1.

    A failed collective is a consequence: whoever caused it has spoken, or is lost and named by its recorder.
    """
    try:
        yield
    except DoraError as error:
        if isinstance(error, PeerLostError) or _first_to_speak(place):
            sys.stderr.write(f"error: {error}\n")
    except BrokenPipeError:
        sys.stderr.write("error: nothing reads the standard output any more; write it to a file, then --resume\n")
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error) and "peer" not in str(error):
            raise
        lost = PeerLostError(f"rank {place.rank} lost a peer: {str(error).splitlines()[0]}", hint="see the last line")
        sys.stderr.write(f"{lost}\n")
    else:
        return
    sys.stderr.flush()
    _leave()


def _first_to_speak(place: Seat) -> bool:
    """Whether no other rank has printed its error yet."""
    if not place.launched:
        return True
    try:
        return _store(place, timeout=timedelta(seconds=5)).add("spoken", 1) == 1
    except RuntimeError:
        return True


def _leave() -> None:
    """End at once: destructors of a process group whose peers are gone may wait for them."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(1)
