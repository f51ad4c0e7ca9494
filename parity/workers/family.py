"""A worker's family: the processes that a subject started in it end when it ends.

A worker leads a session of its own. On Linux it also takes in the orphans among its descendants, so that a program
that left its parent and its session is still found below it. Where there is no /proc, the process group must do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

_PROC = Path("/proc")
_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""
_ROUNDS = 50
"""How often a family is looked through for members that were born meanwhile."""


def lead_family() -> None:
    """Make this process the head of its descendants, whatever they do."""
    os.setsid()
    adopt_orphans()


def adopt_orphans(adopt: bool = True) -> None:
    """Become the parent of descendants that lose theirs, or no longer; only Linux can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SUBREAPER, int(adopt), 0, 0, 0)


def end_families(leaders: Iterable[int]) -> None:
    """Kill each leader with all that it brought about; one that has ended may have left some behind in its session."""
    leaders = [*leaders]
    heads = [leader for leader in leaders if leads(leader)]
    for head in heads:
        _signal(head, signal.SIGSTOP)  # it keeps its children, and gets no more
    end_descendants(leaders)
    for head in heads:
        _signal(head, signal.SIGKILL)
    if not _PROC.exists():
        end_groups(leaders)


def end_groups(leaders: Iterable[int]) -> None:
    """Kill what has stayed in the process group that a leader began with."""
    for leader in leaders:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def end_descendants(leaders: Iterable[int], spared: Iterable[int] = ()) -> None:
    """Kill what lies below these processes or in their sessions, but not themselves, nor those that are spared."""
    leaders, spared = set(leaders), set(spared)
    for _ in range(_ROUNDS):
        members = descendants(leaders) - spared
        if not members:
            return
        for member in members:
            _signal(member, signal.SIGKILL)


def descendants(leaders: set[int]) -> set[int]:
    """The processes below these or in their sessions that still run."""
    table = dict(_processes())
    below: set[int] = set()
    grown = True
    while grown:
        heads = leaders | below
        found = {pid for pid, (parent, session) in table.items() if parent in heads or session in leaders} - leaders
        grown = found != below
        below = found
    return below - {os.getpid()}


def _processes() -> Iterator[tuple[int, tuple[int, int]]]:
    """(pid, (its parent, its session)) of all that are no zombies; nothing where there is no /proc."""
    for path in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = (
                path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
            )
            if state != "Z":
                yield int(path.parent.name), (int(parent), int(session))


@contextlib.contextmanager
def ended_with_us() -> Iterator[None]:
    """A command's frame: what appeared below this process meanwhile, and is still there at its end, is killed."""
    adopt_orphans()
    ours = {os.getpid()}
    before = descendants(ours)
    try:
        yield
    finally:
        own = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
        tracker = getattr(getattr(resource_tracker, "_resource_tracker", None), "_pid", None)
        end_descendants(ours, {*before, *filter(None, (own, tracker))})
        adopt_orphans(False)  # whoever calls a command from Python need not bury what others leave later


def leads(pid: int) -> bool:
    """Whether it is still the worker that it was: a process number may have been given to another one since."""
    if _PROC.exists():
        return dict(_processes()).get(pid, (0, 0))[1] == pid  # one that waits to be buried is none
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
