"""`dora-parity gpu`: run parts that are not in the file yet, each in a process of its own, and write what they found.

As a command, `python -m parity.gpu.command PART DEVICE KEEP` runs one part and prints each finding as a line of JSON.
"""

import importlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from parity.bench.child import answer, end_with_parent, json_lines
from parity.errors import CannotRun
from parity.report.environment import describe
from parity.report.results import write_json

PARTS = ("suite", "codec", "jax", "bench")
SCHEMA = 1
SECONDS = 480.0
"""How long a part may take."""
STYLES = {"falls short": "red", "skipped": "yellow"}


def run_parts(part: str, device: str, keep: str, place: Path, console: Console) -> int:
    """Run `part`, or all; 0 where nothing fell short, 1 where something did or a part did not come to its end.

    Raises:
        CannotRun: a name is unknown, or the file is another environment's or can't be written.
    """
    if part not in (*PARTS, "all"):
        raise CannotRun(f"--part {part!r} is unknown", hint=f"give {', '.join(PARTS)} or all")
    if device not in {"cpu", "cuda"}:
        raise CannotRun(f"--device {device!r} is unknown", hint="cpu or cuda")
    content = _begun(place, describe(device), keep)
    for name in PARTS if part == "all" else (part,):
        if content["parts"].get(name, {}).get("complete"):
            console.print(f"{name}: in {place} already")
        else:
            console.print(f"{name}, at most {SECONDS / 60:.0f} minutes", style="dim")
            content["parts"][name] = ran = {"complete": False, "seconds": 0.0, "findings": [], "reason": ""}
            try:
                _run_part(name, ran, (device, keep), console)
            finally:  # also after Ctrl-C
                write_json(place, content)
    asked = [content["parts"][name] for name in (PARTS if part == "all" else (part,))]
    counts = Counter(found["status"] for ran in asked for found in ran["findings"])
    whole = all(ran["complete"] for ran in asked)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    console.print(f"{'whole' if whole else 'INCOMPLETE'}: {told}")
    return 0 if whole and not counts["falls short"] else 1


def _begun(place: Path, environment: dict[str, str], keep: str) -> dict[str, Any]:
    """The file as far as it is, or a new one.

    Raises:
        CannotRun: it is no such file, or was begun elsewhere or with other findings chosen.
    """
    fresh = {"schema": SCHEMA, "environment": environment, "keep": keep, "parts": {}}
    try:
        if not place.exists():
            write_json(place, fresh)
            return fresh
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotRun(f"--json {place}: {error}", hint="name another file") from None
    if not isinstance(content, dict) or content | {"parts": {}} != fresh:
        raise CannotRun(f"--json {place} was begun with other versions, another device or another -k", hint="remove it")
    return content


def _run_part(name: str, ran: dict[str, Any], words: tuple[str, str], console: Console) -> None:
    """One part, into what is kept of it; also why it ended early."""
    began = time.monotonic()
    try:
        for found in json_lines(__name__, name, *words, seconds=SECONDS, what=f"part {name}", hint="run it again"):
            ran["findings"].append(found)
            console.print(f"{found['status']:11} {found['name']}: {found['said']}", style=STYLES.get(found["status"]))
        ran["complete"] = bool(ran["findings"])
        ran["reason"] = "" if ran["complete"] else f"part {name}: nothing of it has {words[1]!r} in its name"
    except CannotRun as error:
        ran["reason"] = str(error)
    finally:
        ran["seconds"] = round(time.monotonic() - began, 1)
    if ran["reason"]:
        console.print(ran["reason"], style="red")


def main(name: str, device: str, keep: str) -> None:
    """Run one part in this process."""
    end_with_parent()
    for found in importlib.import_module(f"parity.gpu.{name}").findings(device, keep):
        answer(found.as_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
