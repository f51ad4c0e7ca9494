"""A copy of the project in which one file at a time is wrong.

Every process that a test starts (ranks, launchers, commands) finds the wrong file, since the copy is where it runs and
what PYTHONPATH names first. The working tree is never touched.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from operators import Mutant


class Copy:
    """The tracked and the new files of `root`, under `folder`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
        for name in filter(None, names.split("\0")):
            source = root / name
            if source.is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / name)

    @contextmanager
    def with_mutant(self, mutant: Mutant) -> Iterator[None]:
        """Within, the copy has the mutant; afterwards it is right again."""
        path = self.folder / mutant.file
        right, times = path.read_bytes(), path.stat()
        path.write_bytes(mutant.apply(right))
        self._forget(path)
        try:
            yield
        finally:
            path.write_bytes(right)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            self._forget(path)

    def _forget(self, path: Path) -> None:
        """Remove what was compiled of it: two texts written in one second may look like one."""
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()
