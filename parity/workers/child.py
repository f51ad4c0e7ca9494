"""The child's side of `processes.py`: serve jobs from a pipe until the parent is gone. Imports no framework."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parity.workers.group import Seat


def life(main: Callable[[Seat], None]) -> Callable[[Seat], None]:
    """Give a worker's main function what every worker needs; what ends it early is told to the parent, in one line."""

    @functools.wraps(main)
    def live(seat: Seat) -> None:
        try:
            _prepare(seat)
            main(seat)
        except Exception as error:  # noqa: BLE001 - a traceback is no use to whoever reads the parent's output
            with contextlib.suppress(OSError):  # where the parent has gone, nobody wants to know
                seat.connection.send(("error", _one_line(error)))
            os._exit(1)

    return live


def _prepare(seat: Seat) -> None:
    """Leave Ctrl-C to the parent, die with it, and write the stack to a file when asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(seat,), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=Path(seat.stack_file).open("w"), all_threads=False)  # noqa: SIM115 - stays open for the process's life


def serve(seat: Seat, work: Callable[[Any], Any]) -> None:
    """Report readiness, then answer every job with `("done", value)` or `("error", text)`."""
    seat.connection.send(("done", None))
    while True:
        try:
            job = seat.connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", work(job))
        except Exception as error:  # noqa: BLE001 - whatever a subject raises is its case's result
            answer = ("error", _one_line(error))
        seat.connection.send(answer)


def _exit_with_parent(seat: Seat) -> None:
    """Nothing is ever sent through the lifeline: a read returns only when the parent is gone."""
    try:
        seat.lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)


def _one_line(error: Exception) -> str:
    """`ValueError: what (file.py:12)`, the place being the innermost frame outside installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{place}"
