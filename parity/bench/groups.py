"""Rows that are measured together, each group in a process of its own: memory's peak and threads are a process's.

As a command, `python -m parity.bench.groups GROUP` measures one group and prints each row as a line of JSON.
"""

import importlib
import sys
from collections.abc import Iterator

from parity.bench.child import answer, end_with_parent, json_lines
from parity.bench.measure import Row

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
    "sharded": (
        "sharded-collectives/block",
        "sharded-dora/peft",
        "sharded-qdora/peft",
        "sharded-dora/lora",
        "sharded-dora/unsharded",
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
    what = f"the bench group {group}"
    for sent in json_lines(__name__, group, seconds=SECONDS, what=what, hint="leave it out with -k"):
        yield Row(**{key: value for key, value in sent.items() if key != "holds"})  # which follows from the rest


def main(group: str) -> None:
    """Measure one group in this process."""
    end_with_parent()
    for row in importlib.import_module(f"parity.bench.{group}").rows():
        answer(row.as_json())


if __name__ == "__main__":
    main(sys.argv[1])
