"""Phases of a run: what a rank does now, for how long already, and a watchdog that ends a run that hangs.

Words. A *phase* is a named part of a run (`load`, `step 7`) with a limit; its *detail* is the module at hand. Past the
limit the rank that notices tells the others through the store that the launcher keeps; every rank prints its phase, its
detail and its stack, ranks that don't answer are named by the one that noticed, and all end with `EXPIRED`.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch_impl.timing import take_times
from torch_impl.training.recorder import Recorder

EXPIRED = 3
"""Exit status of a run that a watchdog ended."""
GRACE = 24.0
"""Seconds from SIGTERM until a rank that hasn't stopped is ended: torchrun kills after 30, and answers take some."""
STOPS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a run to save and end."""
_START = "start"
_ANSWER_SECONDS = 4.0
_POLL_SECONDS = 0.5


def _left(rank: int) -> str:
    """The key under which a rank says that it has left."""
    return f"dora/left/{rank}"


@dataclass(kw_only=True)
class Phases:
    """A rank's phases, told to its recorder and watched by a thread."""

    rank: int
    world_size: int
    limit: float
    """Seconds that any phase may take."""
    limit_name: str = "--phase-timeout {:g}"
    """What a user calls the limit."""
    recorder: Recorder | None = None
    store: Any = None
    """A connection of the watchdog's own to the launcher's store; None in a run of one process."""
    peers: tuple[tuple[int, str], ...] = ()
    """Process and host of each rank."""
    detail: str = ""
    signals: int | None = None
    """A pipe that holds the numbers of signals which have come: a rank inside a collective runs no handler."""
    stop_requested_at: float | None = None
    _name: str = _START
    _since: float = field(default_factory=time.monotonic)
    _main: int = field(default_factory=threading.get_ident)
    _watchdog: threading.Thread | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def begin(self, name: str) -> None:
        """Enter a phase; the one before it ends."""
        self._name, self._since, self.detail = name, time.monotonic(), ""
        if self.recorder is not None:
            self.recorder.tell(f"phase {name}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that rank 0 prints with its time, and with the times taken within it."""
        self.begin(name)
        take_times()
        start = time.perf_counter()
        yield
        inner = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in take_times().items())
        if self.rank == 0:
            seconds = time.perf_counter() - start
            sys.stdout.write(f"phase {name}: {seconds:.2f} s{f' ({inner})' if inner else ''}\n")
            sys.stdout.flush()

    def watch(self) -> None:
        """Start the watchdog."""
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    def leave(self) -> None:
        """Tell ranks that may come to wait for this one that it has nothing more to do here."""
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(_left(self.rank), self._name)

    def end_watch(self) -> None:
        """Stop the watchdog, and wait until it is gone: Python ends a thread that is inside the store by aborting."""
        self._over.set()
        if self._watchdog is not None:
            self._watchdog.join(_ANSWER_SECONDS)

    def _watch(self) -> None:
        """Until the run is over: is this phase past its limit, or has another rank's passed?"""
        while not self._over.wait(_POLL_SECONDS):
            self._hear()
            stopping = self.stop_requested_at
            if stopping is not None and self._name == _START:
                self._leave()
            if stopping is not None and time.monotonic() - stopping > GRACE:
                self._end(f"not stopped {GRACE:.0f} s after it was asked to")
            if time.monotonic() - self._since > self.limit:
                self._end(f"past {self.limit_name.format(self.limit)} s")
            if self._others_expired():
                self._end("ended because another rank's phase is past its limit", noticed=False)

    def _hear(self) -> None:
        """Whether one of them has come since the last time."""
        with suppress(BlockingIOError):
            if self.signals is not None and set(STOPS) & set(os.read(self.signals, 64)):
                self.stop_requested_at = self.stop_requested_at or time.monotonic()

    def _leave(self) -> None:
        """Asked to stop while the ranks still look for each other: there is nothing to save, and one may never come."""
        sys.stderr.write(f"rank {self.rank}: asked to stop before it had begun\n")
        sys.stderr.flush()
        if self.recorder is not None:
            self.recorder.end()
        os._exit(1)

    def _others_expired(self) -> bool:
        """Whether some rank has called out; a store that is gone says nothing."""
        try:
            return self.store is not None and self.store.check(["dora/expired"])
        except RuntimeError:
            return False

    def _end(self, reason: str, *, noticed: bool = True) -> None:
        """Print this rank's phase, module and stack; wait for the others' where this rank noticed first; exit."""
        seconds = time.monotonic() - self._since
        frame = sys._current_frames().get(self._main)  # noqa: SLF001 - the documented way to another thread's stack
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        where = f"{self._name}{f' at {self.detail}' if self.detail else ''}"
        sys.stderr.write(f"rank {self.rank}: in {where} for {seconds:.1f} s, {reason}\n{stack}")
        sys.stderr.flush()
        if self.store is not None:
            self._call_out(noticed=noticed)
        if self.recorder is not None:
            self.recorder.end()
        os._exit(EXPIRED)

    def _call_out(self, *, noticed: bool) -> None:
        """Tell the others, and name those that don't answer."""
        try:
            self.store.set(f"dora/said/{self.rank}", "1")
            if not noticed:
                return
            self.store.set("dora/expired", "1")
            deadline = time.monotonic() + _ANSWER_SECONDS
            silent = set(range(self.world_size))
            while silent and time.monotonic() < deadline:
                silent = {rank for rank in silent if not self.store.check([f"dora/said/{rank}"])}
                time.sleep(0.1)
        except RuntimeError:
            return
        for rank in sorted(silent):
            if not self._has_left(rank):
                self._give_up(rank)

    def _has_left(self, rank: int) -> bool:
        """Whether a silent rank has left in order; says so."""
        try:
            if not self.store.check([_left(rank)]):
                return False
            sys.stderr.write(f"rank {rank} left the loop after {self.store.get(_left(rank)).decode()}\n")
        except RuntimeError:
            return False
        return True

    def _give_up(self, rank: int) -> None:
        """Name a rank that doesn't answer; end it where it is on this host: a stopped process ignores the launcher."""
        if not self.peers:
            return
        process, host = self.peers[rank]
        sys.stderr.write(f"rank {rank} (pid {process} on {host}) doesn't answer\n")
        if host == socket.gethostname():
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
