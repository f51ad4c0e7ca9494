"""Which tests run a line, quickest first: read from what `tracing.py` wrote.

Of a file that was changed since, a map says nothing: lines have moved, and tests were added, renamed or removed.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path


class Chart:
    """The map; without a file it knows nothing."""

    def __init__(self, path: Path | None = None, root: Path = Path()) -> None:
        self._root = root
        self._begun = math.inf
        self._tests: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._seconds: dict[str, float] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
            entry = json.loads(line)
            if "begun" in entry:
                self._begun = entry["begun"]
                continue
            self._seconds[entry["test"]] = entry["seconds"]
            for file, numbers in entry["lines"].items():
                for number in numbers:
                    self._tests[file, number].add(entry["test"])

    def tests(self, file: str, line: int, *, among: set[str], seconds: float) -> list[str]:
        """Tests of the test files `among` that run the line, quickest first, for about so many seconds."""
        tests = [test for test in self._tests.get((file, line), ()) if test.partition("::")[0] in among]
        tests.sort(key=lambda test: (self._seconds[test], test))
        spent = itertools.accumulate(self._seconds[test] for test in tests)
        return [test for test, so_far in zip(tests, spent, strict=True) if so_far <= seconds] or tests[:1]

    def is_of(self, file: str) -> bool:
        """Whether a file, by its path in the repository, is still as it was when the map was begun."""
        return math.isinf(self._begun) or (self._root / file).stat().st_mtime <= self._begun

    def knows(self, tests: Iterable[str]) -> bool:
        """Whether all of them were watched."""
        return all(test in self._seconds for test in tests)

    def seconds(self, tests: Iterable[str]) -> float:
        """How long they took together."""
        return sum(self._seconds[test] for test in tests)
