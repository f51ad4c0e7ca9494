"""Temporary folders that bear their owner's process number, so that what a killed run left is swept by the next."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LONGEST_FOR_SOCKETS = 70
"""Bytes of a folder's path: a Unix socket's has 107 at most, and multiprocessing adds 32."""
_SHORT = "/tmp"  # noqa: S108 - multiprocessing makes a folder of its own in it, which nobody else can read
_NAME = re.compile(r"dora-parity-(\d+)-\w+")


def own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process's."""
    return tempfile.TemporaryDirectory(prefix=own_prefix(), ignore_cleanup_errors=True)


def own_prefix() -> str:
    """What the names of this process's folders begin with."""
    return f"dora-parity-{os.getpid()}-"


def sweep_leftovers() -> None:
    """Remove the folders of runs that have ended without removing them; no other folder, and none of another user."""
    for path in Path(tempfile.gettempdir()).glob("dora-parity-*"):
        found = _NAME.fullmatch(path.name)
        if found and not path.is_symlink() and path.is_dir() and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def room_for_sockets() -> Iterator[None]:
    """Meanwhile new temporary folders lie where a socket's path fits, whatever TMPDIR is."""
    chosen = tempfile.gettempdir()
    if len(os.fsencode(chosen)) > _LONGEST_FOR_SOCKETS:
        tempfile.tempdir = _SHORT
    try:
        yield
    finally:
        tempfile.tempdir = chosen


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's, or no process number at all
    return True
