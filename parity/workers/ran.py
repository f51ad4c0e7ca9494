"""Which functions of the specification ran in a process: a clause whose function never runs has been shown nothing."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


class Ran:
    """Notes what is called from now on. JAX calls a function once a compilation, which is enough to be noted."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ref")
        self._room = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
        self._codes: set[CodeType] = set()

    def begin(self) -> None:
        """In this thread, and in those that begin later."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def names(self) -> list[str]:
        """Their import paths; a class whose constructor ran is one of them."""
        below = [code for code in tuple(self._codes) if Path(code.co_filename).is_relative_to(self._room)]
        return sorted({self._path(code) for code in below})

    def _path(self, code: CodeType) -> str:
        module = Path(code.co_filename).relative_to(self._room).with_suffix("")
        return ".".join(["ref", *module.parts, code.co_qualname.partition(".")[0]])

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._codes.add(frame.f_code)
