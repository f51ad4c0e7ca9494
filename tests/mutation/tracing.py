"""A pytest plugin that writes down which lines of torch_impl and ref each test runs, and how long it takes.

Only this process is watched: what a test runs in ranks or commands is not in the map. What JAX has traced for one test
it does not trace again for the next, so a line may lack some of its tests, but not all. One line of JSON a test.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

_ROOMS = ("torch_impl/", "ref/")


class Watch:
    """The lines that run while it is on."""

    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        self._lines: dict[str, set[int]] = defaultdict(set)
        self._paths: dict[str, str] = {}

    def _name(self, path: str) -> str:
        """The file's path in the repository, empty where it is not watched."""
        if path not in self._paths:
            name = path.removeprefix(self._root)
            self._paths[path] = name if name != path and name.startswith(_ROOMS) else ""
        return self._paths[path]

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        """Python's trace function: of each call in a watched file, note the lines."""
        name = self._name(frame.f_code.co_filename)
        if not name or event != "call" or frame.f_code.co_name == "<module>":
            return None
        lines = self._lines[name]

        def note(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return note

        return note

    def lines(self) -> dict[str, list[int]]:
        """What ran since the last time this was asked."""
        found = {name: sorted(lines) for name, lines in self._lines.items() if lines}
        self._lines.clear()
        return found


class Map:
    """Writes the map while pytest runs."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        self._watch = Watch(root)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch one test with its fixtures."""
        start = time.monotonic()
        threading.settrace(self._watch)
        sys.settrace(self._watch)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            entry = {"test": item.nodeid, "seconds": round(time.monotonic() - start, 3), "lines": self._watch.lines()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the map that $MUTATION_MAP names, with the time: it is of the files as they are now."""
    path = Path(os.environ["MUTATION_MAP"]).resolve()
    path.write_text(json.dumps({"begun": time.time()}) + "\n", encoding="utf-8")
    config.pluginmanager.register(Map(path, config.rootpath))
