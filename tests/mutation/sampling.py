"""Which mutants are tried, and in which order: those on changed lines first, then a sample stratified by file.

The order is the sample: the first N of it hold about the same share of every file, whatever N is, so that a run that is
cut off by its time has still looked everywhere.
"""

import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from operators import Mutant

Lines = dict[str, set[int]]
"""Numbers of lines by file."""


def in_order(mutants: Iterable[Mutant], *, seed: int, changed: Lines) -> list[Mutant]:
    """All mutants, each once: those that `changed` names, then the others; each part stratified by file."""
    first, others = [], []
    for mutant in mutants:
        (first if mutant.line in changed.get(mutant.file, ()) else others).append(mutant)
    return [*_stratified(first, seed), *_stratified(others, seed)]


def _stratified(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """Shuffle every file's mutants, then deal the files together, so that each is as far on as the others."""
    by_file: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_file[mutant.file].append(mutant)
    placed: list[tuple[float, str, Mutant]] = []
    for file, own in by_file.items():
        random.Random(f"{seed} {file}").shuffle(own)  # noqa: S311 - a draw that can be drawn again
        placed += [((position + 0.5) / len(own), file, mutant) for position, mutant in enumerate(own)]
    return [mutant for _, _, mutant in sorted(placed, key=lambda entry: entry[:2])]


def changed_lines(root: Path, revision: str) -> Lines:
    """The lines that the working tree has and `revision` has not.

    Raises:
        LookupError: git knows no such revision, or there is no git.
    """
    command = ["git", "-C", str(root), "diff", "--unified=0", "--no-color", "--no-ext-diff", revision, "--", "*.py"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - git, by its name
    if answer.returncode:
        raise LookupError(answer.stderr.strip())
    return _added(answer.stdout)


def _added(diff: str) -> Lines:
    """The lines that a diff without context adds."""
    lines: Lines = defaultdict(set)
    file = ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ ").removeprefix("b/")
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            start, count = int(hunk[1]), int(hunk[2] or 1)
            lines[file].update(range(start, start + count))
    return lines
