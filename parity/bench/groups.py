"""Rows that are measured together, each group in a process of its own: memory's peak and threads are a process's.

As a command, `python -m parity.bench.groups GROUP` measures one group and prints each row as a line of JSON.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

from parity.bench.measure import Row
from parity.errors import CannotRun

GROUPS = {
    "linear": ("linear-dora/lora", "linear-dora/peft"),
    "network": (
        "smollm2-dora/lora",
        "smollm2-dora/peft",
        "smollm2-qdora/qlora",
        "smollm2-qdora/peft",
        "smollm2-lora/peft",
        "smollm2-qlora/peft",
    ),
    "prepare": ("prepare-qdora/qlora", "prepare-qdora/peft"),
    "memory": ("memory-dora/lora",),
    "codec": ("nf4-encode/bnb", "nf4-decode/bnb"),
    "jax_step": ("jax-step/torch",),
}
"""Each group's module in this package, and the rows that it gives, in their order."""
SECONDS = 1200.0
"""How long one group may take, on a machine with other work as well."""


def measure(group: str) -> Iterator[Row]:
    """The group's rows as they come.

    Raises:
        CannotRun: its process failed, or took too long; the reason is its last line.
    """
    command = [sys.executable, "-m", __name__, group]
    with subprocess.Popen(  # noqa: S603 - ourselves
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        late = threading.Timer(SECONDS, process.kill)
        said: list[str] = []
        listener = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        try:
            late.start()
            listener.start()
            for line in process.stdout or ():
                yield _row(json.loads(line))
            status = process.wait()
            listener.join()
            if status:
                reason = f"no answer within {SECONDS:g} s" if late.finished.is_set() else _last(said, status)
                raise CannotRun(f"the bench group {group}: {reason}", hint="leave it out with -k")
        finally:
            late.cancel()
            process.kill()


def _row(sent: dict) -> Row:
    """A row from its JSON; `holds` follows from the rest."""
    return Row(**{key: value for key, value in sent.items() if key != "holds"})


def _last(said: list[str], status: int) -> str:
    """What a process that failed said last."""
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else f"ended with status {status}"


def end_with_parent() -> None:
    """Leave when the pipe from the command closes, however it ended; a process started by a group inherits the pipe."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(group: str) -> None:
    """Measure one group in this process."""
    end_with_parent()
    for row in importlib.import_module(f"parity.bench.{group}").rows():
        print(json.dumps(row.as_json()), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1])
