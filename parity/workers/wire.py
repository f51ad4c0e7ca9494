"""Frames: how a worker's answer crosses to its parent, as bytes that are read and never run.

    frame  = magic, header's size, body's size, header, body
    header = JSON: the job's number, and an `answer` or an `error`
    body   = raw bytes that the header describes

The parent checks both sizes before it takes memory for them, waits until a deadline for the whole frame, and looks
at nothing but what it asked for: a frame of another job is no answer.
"""

from __future__ import annotations

import json
import operator
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from numbers import Integral
from typing import Any

from parity.errors import NoAnswer

_MAGIC = b"dora"
_PREFIX = struct.Struct("!4sIQ")
_HEADER_BYTES = 2**25
"""The largest header that is read; the largest of the suite's own cases is a hundredth of it."""
_PIECE_BYTES = 2**20
_LOOK_SECONDS = 0.3
"""How often a worker is looked for whose sentinel tells nothing any more."""


@dataclass(frozen=True)
class Packed:
    """An answer in the form that crosses: what JSON can say, and bytes."""

    header: Any
    body: bytes = b""


@dataclass(frozen=True)
class Frame:
    """What came."""

    answer: Any
    error: str | None
    body: bytearray


def send_answer(connection: Connection, job: int, packed: Packed) -> None:
    """Send what a job gave."""
    _send(connection, {"job": job, "answer": packed.header}, packed.body)


def send_error(connection: Connection, job: int, text: str) -> None:
    """Send why a job gave nothing."""
    _send(connection, {"job": job, "error": text}, b"")


def plain(value: Any) -> Any:
    """For JSON: a slice by its ends, numpy's integers as Python's.

    Raises:
        TypeError: the value is nothing that an answer may hold.
    """
    if isinstance(value, slice):
        return [value.start, value.stop]
    if isinstance(value, Integral):
        return operator.index(value)
    raise TypeError(f"a {type(value).__name__} is nothing that an answer may hold")


def _send(connection: Connection, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header, default=plain).encode()
    _write(connection, _PREFIX.pack(_MAGIC, len(text), len(body)) + text)
    _write(connection, body)


def _write(connection: Connection, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(connection.fileno(), view) :]


@dataclass(frozen=True)
class Source:
    """Where answers come from: a pipe, and what tells that the worker at its other end has ended."""

    connection: Connection
    sentinel: int
    """A descendant may hold the pipe open beyond the worker's end."""
    is_gone: Callable[[], bool]
    """Whether it is the worker that has ended, where the sentinel says that something has."""

    def read(self, size: int, deadline: float) -> bytearray:
        """So many bytes; memory is taken as they come, whatever size was announced.

        Raises:
            TimeoutError: the deadline came first.
            EOFError: the other end is closed, or has ended.
        """
        content = bytearray()
        watched: list[Any] = [self.connection, self.sentinel]
        while len(content) < size:
            left = deadline - time.monotonic()
            ready = wait(watched, max(0.0, left if len(watched) > 1 else min(left, _LOOK_SECONDS)))
            if self.connection not in ready:
                if left <= 0:
                    raise TimeoutError
                if len(watched) == 1 or ready:
                    watched = [self.connection]  # where it was the fork server that ended, the worker may yet answer
                    self._check_there()
                continue
            piece = os.read(self.connection.fileno(), min(size - len(content), _PIECE_BYTES))
            if not piece:
                raise EOFError
            content += piece
        return content

    def _check_there(self) -> None:
        if self.is_gone():
            raise EOFError


def receive(source: Source, job: int, *, deadline: float, most_bytes: int) -> Frame:
    """Read one frame, whole.

    Raises:
        TimeoutError: the deadline came first.
        EOFError: the other end is closed, or has ended.
        NoAnswer: what came is no frame, too large, or an answer to another job.
    """
    prefix = source.read(_PREFIX.size, deadline)
    magic, header_bytes, body_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise NoAnswer(f"it begins with the bytes {bytes(prefix[:8])!r}")
    _check_size("header", header_bytes, _HEADER_BYTES)
    _check_size("body", body_bytes, most_bytes)
    header = _parse(source.read(header_bytes, deadline))
    if header.get("job") != job:
        raise NoAnswer("it answers another job")
    error = header.get("error")
    if error is not None and not isinstance(error, str):
        raise NoAnswer("its error is no text")
    return Frame(header.get("answer"), error, source.read(body_bytes, deadline))


def has_spoken(connection: Connection) -> bool:
    """Whether bytes wait there to be read."""
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        try:
            return bool(peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except (BlockingIOError, ConnectionResetError):
            return False


def is_listening(connection: Connection) -> bool:
    """Whether a job can be sent without waiting for the other end to read earlier ones."""
    asked = select.poll()
    asked.register(connection.fileno(), select.POLLOUT)
    return bool(asked.poll(0))


def _check_size(what: str, size: int, most: int) -> None:
    if size > most:
        raise NoAnswer(f"its {what} is to have {size} bytes, more than {most}")


def _parse(text: bytearray) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"its header cannot be read: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise NoAnswer("its header is no object")
    return header
