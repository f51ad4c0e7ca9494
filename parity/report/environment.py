"""What a result was made with: versions, processor, device; and whether these are the recorded ones."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

RECORDED = {
    "torch": "2.13.0",
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "bitsandbytes": "0.50.2",
    "numpy": "2.4.6",
    "transformers": "5.23.0",
    "peft": "0.21.2",
}
"""The versions that the bitwise claims were made with; `constraints.txt` installs them, and a test keeps both alike."""


def describe(device: str) -> dict[str, str]:
    """Name and version of everything that a bit may depend on."""
    versions = {name: importlib.metadata.version(name) for name in RECORDED}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_field("model name"),
        "isa": ", ".join(
            flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in _cpu_field("flags")
        ),
        "device": device,
    }


def deviations(environment: dict[str, str]) -> list[str]:
    """Packages that are not at their recorded version, in words."""
    return [
        f"{name} {environment[name]} (recorded: {version})"
        for name, version in RECORDED.items()
        if environment[name].split("+")[0] != version
    ]


def _cpu_field(field: str) -> str:
    """A field of the first processor; empty where the system has no such list."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return ""
    lines = (line for line in listing.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return next(lines, ":").partition(":")[2].strip()
