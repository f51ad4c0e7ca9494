"""A process that answers in lines of JSON: started with a limit, ended with its parent, its last word its reason."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from parity.errors import CannotRun


def json_lines(module: str, *words: str, seconds: float, what: str, hint: str) -> Iterator[dict[str, Any]]:
    """What `python -m module words` prints, as it comes.

    Raises:
        CannotRun: it failed or took longer than `seconds`; the reason is its last line, `what` names it.
    """
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(  # noqa: S603 - ourselves
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        late = threading.Timer(seconds, process.kill)
        said: list[str] = []
        listener = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        try:
            late.start()
            listener.start()
            for line in process.stdout or ():
                yield json.loads(line)
            status = process.wait()
            listener.join()
            if status:
                reason = f"no answer within {seconds:g} s" if late.finished.is_set() else _last(said, status)
                raise CannotRun(f"{what}: {reason}", hint=hint)
        finally:
            late.cancel()
            process.kill()


def _last(said: list[str], status: int) -> str:
    """What a process that failed said last."""
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else f"ended with status {status}"


def answer(content: dict[str, Any]) -> None:
    """Print one line."""
    print(json.dumps(content), flush=True)  # noqa: T201 - the answer


def end_with_parent() -> None:
    """Leave when the pipe from the command closes, however it ended; what this process starts inherits the pipe."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
