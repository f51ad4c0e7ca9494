"""The child's side of `group.py`: serve jobs from a pipe until the parent is gone. Imports no framework."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parity import fields, shard
from parity.printable import printable
from parity.workers import family
from parity.workers.group import READY, Seat
from parity.workers.memory import GIB, is_out_of_memory, limit_memory
from parity.workers.wire import Packed, send_answer, send_error


def life(main: Callable[[Seat], None]) -> Callable[[Seat], None]:
    """Give a worker's main function what every worker needs; what ends it early is told to the parent, in one line."""

    @functools.wraps(main)
    def live(seat: Seat) -> None:
        try:
            _prepare(seat)
            main(seat)
        except BaseException as error:  # noqa: BLE001 - a traceback is no use to whoever reads the parent's output
            with contextlib.suppress(OSError):  # where the parent has gone, nobody wants to know
                send_error(seat.connection, READY, _one_line(error, seat))
            os._exit(1)

    return live


def _prepare(seat: Seat) -> None:
    """Leave Ctrl-C to the parent, die with it and take one's family along; write the stack to a file when asked.

    What it prints goes to the standard error: the standard output is the judge's. Its temporary files lie in the
    group's folder, and are removed with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    family.lead_family()
    os.dup2(2, 1)
    os.environ["TMPDIR"] = tempfile.tempdir = str(Path(seat.stack_file).parent)
    if seat.memory:
        limit_memory(seat.memory)
    threading.Thread(target=_exit_with_parent, args=(seat,), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=Path(seat.stack_file).open("w"), all_threads=False)  # noqa: SIM115 - stays open for the process's life


def serve(seat: Seat, work: Callable[[Any], Packed]) -> None:
    """Report readiness, then answer every job, with what it gave or with why it gave nothing."""
    own = os.getpid()
    send_answer(seat.connection, READY, Packed(None))
    while True:
        try:
            number, job = seat.connection.recv()
        except EOFError:
            return
        try:
            answer = work(job)
        except BaseException as error:  # noqa: BLE001 - whatever a subject raises is its case's result
            answer = _one_line(error, seat)
        if os.getpid() != own:
            os._exit(1)  # a copy of this rank that its subject forked: it has nothing to say
        if isinstance(answer, str):
            send_error(seat.connection, number, answer)
        else:
            send_answer(seat.connection, number, answer)


def _exit_with_parent(seat: Seat) -> None:
    """Nothing is ever sent through the lifeline: a read returns only when the parent is gone."""
    try:
        seat.lifeline.recv()
    except (EOFError, OSError):
        family.end_descendants({os.getpid()})
        family.end_groups([os.getpid()])  # ends this process too, where it leads its group
        os._exit(1)


def _one_line(error: BaseException, seat: Seat) -> str:
    """`raised ValueError: what (file.py:12)`; out of memory is said as such."""
    place = _place(error)
    if seat.memory and is_out_of_memory(error):
        return f"needed more than {seat.memory / GIB:.1f} GiB{place}"
    return printable(f"raised {type(error).__name__}: {_text_of(error)}") + place


def _place(error: BaseException) -> str:
    """The innermost frame that is neither an installed package's nor of the checks that records make of themselves."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = ("site-packages", "<string>", "dataclasses.py", fields.__file__, shard.__file__)
    own = [frame for frame in frames if not any(part in frame.filename for part in foreign)] or frames
    return f" ({printable(Path(own[-1].filename).name, 100)}:{own[-1].lineno})" if own else ""


def _text_of(error: BaseException) -> str:
    try:
        return printable(str(error), 600)
    except BaseException as another:  # noqa: BLE001 - whatever a subject's error does when it is asked
        return f"its text cannot be had, for {type(another).__name__}"
