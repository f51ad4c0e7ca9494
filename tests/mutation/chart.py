"""Which tests run a line, quickest first: read from what `tracing.py` wrote."""

import json
from collections import defaultdict
from pathlib import Path


class Chart:
    """The map; without a file it knows nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._tests: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._seconds: dict[str, float] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
            entry = json.loads(line)
            self._seconds[entry["test"]] = entry["seconds"]
            for file, numbers in entry["lines"].items():
                for number in numbers:
                    self._tests[file, number].add(entry["test"])

    def tests(self, file: str, line: int, *, among: set[str]) -> list[str]:
        """Tests of the test files `among` that run the line, quickest first."""
        tests = [test for test in self._tests.get((file, line), ()) if test.partition("::")[0] in among]
        return sorted(tests, key=lambda test: (self._seconds[test], test))
