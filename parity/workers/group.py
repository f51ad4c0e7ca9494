"""A group of worker processes that stays up across jobs, and never outlives or outwaits its parent.

Each worker serves one pipe. The parent waits with a limit, on the pipes and on the processes themselves, so a
crash is seen at once and a hang at the limit; either is raised as `CaseFailed`, naming the ranks, and the whole
group is killed with all that it started: what a half-finished collective left behind is not worth repairing. The next
job starts a new group. Workers watch a lifeline pipe and exit when its other end closes, however the parent ended.

Jobs are numbered. What a worker sends is read as data (`wire.py`, `answers.py`); what cannot be read, or answers
another job, is the error of the case.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from parity.errors import CaseFailed, CaseHung, NoAnswer
from parity.folders import own_folder, room_for_sockets
from parity.printable import printable
from parity.workers.family import end_families, leads
from parity.workers.memory import rank_memory
from parity.workers.wire import Frame, Source, has_spoken, is_listening, receive

_FORK_SERVERS = 5
"""How many are tried."""
READY = 0
"""The number of the answer that a worker gives unasked, once: that it can be asked."""
START_SECONDS = 120.0
"""How long a new worker may take to import its framework and find its peers."""
_LAST_WORDS_SECONDS = 0.3
"""How long the other ranks may take to report an error of their own once one has."""


@dataclass(frozen=True)
class Seat:
    """What a worker is given at birth."""

    rank: int
    world: int
    connection: Connection
    lifeline: Connection
    meeting_place: str
    """A file through which the ranks find each other."""
    stack_file: str
    """Where the worker writes its stack when it is asked (SIGUSR1)."""
    memory: int | None = None
    """Bytes that the worker may have, or None where it is this project's own code that runs."""
    options: dict[str, Any] = field(default_factory=dict)


Read = Callable[[Any, bytearray, int], Any]
"""From the header and the body of an answer, and the rank that it came from, to what is in it."""


class Workers:
    """`world` processes running `target(seat)`, started at the first call and again after a failure."""

    def __init__(
        self,
        target: Callable[[Seat], None],
        world: int,
        *,
        context: BaseContext,
        options: dict[str, Any],
        memory: int | None = None,
    ) -> None:
        self._target = target
        self._context = context
        self._options = options
        self._memory = memory
        self._most_bytes = (memory or rank_memory(1)) // 2  # of an answer: it is held twice while it is sent
        self._jobs = 0
        self.world = world
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._lifeline: Connection | None = None
        self._folder: TemporaryDirectory[str] | None = None
        self._closed = False
        self._busy = threading.Lock()

    def call(self, job: Any, read: Read, *, seconds: float) -> list[Any]:
        """Give every worker the same job and return their answers, as `read` takes them, in rank order.

        Raises:
            CaseFailed: a worker raised, died, sent what is no answer, or no answer within `seconds`; the group is
                gone then.
        """
        with self._busy:
            try:
                if not self._processes:
                    self._start()
                self._jobs += 1
                for rank, connection in enumerate(self._connections):
                    self._send(rank, connection, (self._jobs, job))
                frames = self._gather(self._jobs, time.monotonic() + seconds, f"{seconds:g} s")
                return [self._read(read, frame, rank) for rank, frame in enumerate(frames)]
            except BaseException:
                self._kill()
                raise

    def close(self) -> None:
        """End every worker for good; another thread's call ends with them, and tidies up itself."""
        self._closed = True
        end_families(process.pid or 0 for process in [*self._processes])
        for process in [*self._processes]:
            process.kill()
        with self._busy:
            self._kill()

    def _send(self, rank: int, connection: Connection, numbered: tuple[int, Any]) -> None:
        """A worker that died or spoke while nobody asked is named, and fails the job that finds it."""
        if has_spoken(connection):
            raise CaseFailed(f"rank {rank} spoke before it was given this case")
        if not is_listening(connection):
            raise CaseFailed(f"rank {rank} answers without reading what it is asked")
        try:
            connection.send(numbered)
        except (BrokenPipeError, ConnectionResetError):
            raise CaseFailed(f"{self._died(rank)} before it was given this case") from None

    def _kill(self) -> None:
        """End every worker at once, with all that it started; harmless where none runs."""
        end_families(process.pid or 0 for process in self._processes)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in [*self._connections, *([self._lifeline] if self._lifeline else [])]:
            connection.close()
        self._processes, self._connections, self._lifeline = [], [], None
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = own_folder()
        reader, self._lifeline = multiprocessing.Pipe(duplex=False)
        for rank in range(self.world):
            ours, theirs = multiprocessing.Pipe()
            seat = Seat(
                rank=rank,
                world=self.world,
                connection=theirs,
                lifeline=reader,
                meeting_place=str(Path(self._folder.name) / "store"),
                stack_file=self._stack_file(rank),
                memory=self._memory,
                options=self._options,
            )
            process = self._context.Process(target=self._target, args=(seat,), daemon=True)
            self._begin(process)
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            if self._closed:
                raise CaseFailed("the run has ended")
        reader.close()
        self._gather(READY, time.monotonic() + START_SECONDS, f"{START_SECONDS:g} s at the start")

    def _begin(self, process: multiprocessing.process.BaseProcess) -> None:
        """Start it with interrupts held back, or its fork server, which passes that on and takes seconds to answer.

        A subject may have killed the fork server, which takes a moment to be seen: then there is a new one.
        """
        if self._context.get_start_method() != "forkserver":
            with _interrupts_held_back():
                process.start()
            return
        for _ in range(_FORK_SERVERS):
            with _interrupts_held_back(), room_for_sockets():
                forkserver.ensure_running()
            try:
                process.start()
            except (ConnectionError, EOFError):
                time.sleep(_LAST_WORDS_SECONDS)
            else:
                return
        raise CaseFailed("no rank could be started: the fork server ends again and again")

    def _stack_file(self, rank: int) -> str:
        return str(Path(self._folder.name) / f"stack-{rank}") if self._folder else os.devnull

    def _gather(self, job: int, deadline: float, limit: str) -> list[Frame]:
        """One answer from each worker, and nothing besides."""
        frames: dict[int, Frame] = {}
        while len(frames) < self.world:
            waiting = [rank for rank in range(self.world) if rank not in frames]
            ready = self._wait(waiting, deadline)
            if not ready:
                raise CaseHung(self._hung(waiting, limit))
            for rank in ready:
                frames[rank] = self._receive(rank, job, deadline, limit)
        for rank, connection in enumerate(self._connections):
            if has_spoken(connection):
                raise CaseFailed(f"rank {rank} sent more than its answer")
        return [frames[rank] for rank in range(self.world)]

    def _wait(self, ranks: list[int], deadline: float) -> list[int]:
        sources = {self._connections[rank]: rank for rank in ranks} | {
            self._processes[rank].sentinel: rank for rank in ranks
        }
        ready = wait(list(sources), timeout=max(0.0, deadline - time.monotonic()))
        return sorted({sources[source] for source in ready})

    def _receive(self, rank: int, job: int, deadline: float, limit: str) -> Frame:
        try:
            frame = receive(self._source(rank), job, deadline=deadline, most_bytes=self._most_bytes)
        except TimeoutError:
            raise CaseHung(f"{self._hung([rank], limit)}, which stopped amid its answer") from None
        except (EOFError, ConnectionResetError):
            raise CaseFailed(self._died(rank)) from None
        except NoAnswer as error:
            raise CaseFailed(f"rank {rank} sent what is no answer: {printable(str(error))}") from None
        if frame.error is not None:
            raise CaseFailed("; ".join([f"rank {rank} {printable(frame.error)}", *self._other_errors(rank, job)]))
        return frame

    def _source(self, rank: int) -> Source:
        process = self._processes[rank]
        gone = lambda: process.exitcode is not None and not leads(process.pid or 0)  # noqa: E731 - asked later, if at all
        return Source(self._connections[rank], process.sentinel, gone)

    def _read(self, read: Read, frame: Frame, rank: int) -> Any:
        """What is in a frame."""
        try:
            return read(frame.answer, frame.body, rank)
        except NoAnswer as error:
            raise CaseFailed(f"rank {rank} sent what is no answer: {printable(str(error))}") from None

    def _other_errors(self, first: int, job: int) -> list[str]:
        """What becomes of the other ranks within a moment: often the same, sometimes the cause."""
        errors, deadline = [], time.monotonic() + _LAST_WORDS_SECONDS
        for rank in range(self.world):
            if rank == first:
                continue
            try:
                frame = receive(self._source(rank), job, deadline=deadline, most_bytes=self._most_bytes)
            except (EOFError, ConnectionResetError):
                errors.append(self._died(rank))
            except (TimeoutError, NoAnswer):
                continue
            else:
                errors += [f"rank {rank} {printable(frame.error)}"] if frame.error is not None else []
        return errors

    def _died(self, rank: int) -> str:
        """How a worker ended, of which nothing more can be read."""
        self._processes[rank].join(timeout=1.0)
        code = self._processes[rank].exitcode
        how = "closed its pipe" if code is None else f"ended with status {code}"
        how = f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else how
        return f"rank {rank} of {self.world} (pid {self._processes[rank].pid}) {how}"

    def _hung(self, waiting: list[int], limit: str) -> str:
        """Name the ranks that did not answer in full, each with the innermost line it stood at."""
        for rank in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(_LAST_WORDS_SECONDS)
        places = [f"rank {rank} at {printable(_innermost_line(self._stack_file(rank)), 200)}" for rank in waiting]
        return f"no answer within {limit} from " + ", ".join(places)


def kill_fork_server() -> None:
    """While it still imports, it does not see that its parent is gone, and there is no public way to end it."""
    pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process inherits this: Ctrl-C in its first moments, before `life` begins, is not for it."""
    resource_tracker.ensure_running()  # started within, it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _innermost_line(stack_file: str) -> str:
    """The innermost frame of a faulthandler dump that is not the library's own waiting."""
    path = Path(stack_file)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    frames = [line.strip().removeprefix("File ") for line in lines if line.strip().startswith("File ")]
    own = [frame for frame in frames if "site-packages" not in frame and "/lib/python" not in frame]
    return (own or frames or ["an unknown place"])[0]
