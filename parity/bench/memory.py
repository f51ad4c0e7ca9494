"""The most memory that a process holds which does nothing but train SmolLM2 with one method."""

import json
import subprocess
import sys
from collections.abc import Iterator

import torch

from parity.bench.child import end_with_parent
from parity.bench.measure import Row
from parity.bench.network import TOKENS, ours, step
from parity.models.pretrained import locate, token_ids
from torch_impl.memory import host_memory

SECONDS = 300
"""How long one of the processes may take."""


def rows() -> Iterator[Row]:
    """`memory-dora/lora`, in bytes."""
    dora, lora = peak_of("dora"), peak_of("lora")
    yield Row("memory-dora/lora", dora, lora, dora / lora, limit=1.10, unit="B")


def peak_of(method: str) -> int:
    """Bytes, of a process of its own."""
    command = [sys.executable, "-m", __name__, method]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=SECONDS)  # noqa: S603 - ours
    if done.returncode:  # its last line is the reason
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def trained(method: str) -> int:
    """Take three steps in this process, and give its peak in bytes."""
    torch.set_num_threads(1)
    model = locate(None)
    run = step(ours(model, method), torch.as_tensor(token_ids(model, TOKENS)).reshape(1, TOKENS))
    for _ in range(3):
        run()
    return host_memory(peak=True)


if __name__ == "__main__":
    end_with_parent()
    print(json.dumps(trained(sys.argv[1])))  # noqa: T201 - the answer
