"""The suite with its torch ranks on the device, unsharded, and on two ranks where the device allows two."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from parity.gpu.finding import Finding

KEEP = "torch_impl and not pretrained"


def findings(device: str, keep: str) -> Iterator[Finding]:
    """Worlds 1 and 2; NCCL takes one rank a device."""
    yield _world(1, device, keep)
    if device == "cuda" and torch.cuda.device_count() == 1:
        yield Finding("suite/world-2", "skipped", "NCCL takes one rank a device, and there is one")
    else:
        yield _world(2, device, keep)


def _world(world: int, device: str, keep: str) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "results.json"
        chosen = f"({KEEP}) and ({keep})" if keep else KEEP
        words = ["run", "-k", chosen, "--world", str(world), "--device", device, "--json", str(place)]
        done = subprocess.run([sys.executable, "-m", "parity", *words], stdout=sys.stderr, check=False)  # noqa: S603 - ourselves
        if not place.exists():
            return Finding(f"suite/world-{world}", "falls short", f"`dora-parity run` ended with {done.returncode}")
        cases = json.loads(place.read_text(encoding="utf-8"))["cases"]
    return verdict(f"suite/world-{world}", cases, done.returncode)


def verdict(name: str, cases: list[dict], status: int) -> Finding:
    """`run` says that it holds by its exit status; without one case that passed nothing was shown. The rest is told."""
    counts = Counter(case["status"] for case in cases)
    short = [case["id"] for case in cases if case["status"] in {"failed", "error"}]
    checks = sum(not check.get("vacuous") for case in cases for check in case["checks"])
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + f"; {checks} checks"
    named = f": {', '.join(short[:5])}{' ...' if len(short) > 5 else ''}" if short else ""  # noqa: PLR2004
    return Finding(name, "holds" if counts["passed"] and not status else "falls short", said + named)
