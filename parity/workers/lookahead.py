"""One thread that works through what it is asked, in order; an urgent question is next."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_URGENT, _IN_TURN, _LAST = 0, 1, 2


class Ahead:
    """A queue of calls and the thread that makes them."""

    def __init__(self) -> None:
        self._calls: queue.PriorityQueue[tuple[int, int, Future[Any], Callable[[], Any]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any], *, urgent: bool = False) -> Future[Any]:
        """Make the call in turn, or next; its result or exception comes through the future."""
        future: Future[Any] = Future()
        self._calls.put((_URGENT if urgent else _IN_TURN, next(self._numbers), future, call))
        return future

    def close(self) -> None:
        """Drop what waits, and let the thread end after the call it is at."""
        while True:
            try:
                self._calls.get_nowait()[2].cancel()
            except queue.Empty:
                break
        self._calls.put((_LAST, next(self._numbers), Future(), self._stop))
        self._thread.join()

    def _work(self) -> None:
        while True:
            _, _, future, call = self._calls.get()
            if call == self._stop:
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                    future.set_exception(error)

    def _stop(self) -> None:
        """Marks the end of the queue; never called."""
