"""Temporary folders that bear their owner's process number, so that what a killed run left is swept by the next."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

_NAME = re.compile(r"dora-parity-(\d+)-\w+")


def own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process's."""
    return tempfile.TemporaryDirectory(prefix=f"dora-parity-{os.getpid()}-", ignore_cleanup_errors=True)


def sweep_leftovers() -> None:
    """Remove the folders of runs that have ended without removing them; no other folder, and none of another user."""
    for path in Path(tempfile.gettempdir()).glob("dora-parity-*"):
        found = _NAME.fullmatch(path.name)
        if found and not path.is_symlink() and path.is_dir() and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's, or no process number at all
    return True
