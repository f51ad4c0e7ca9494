"""How much memory this process holds, or has held."""

import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU, or resident in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_memory(peak=True)


def host_memory(*, peak: bool) -> int:
    """Bytes of this process that lie in host memory, now or at most so far.

    Linux's own count, where there is one: `getrusage` begins with the peak of the process that started this one, knows
    nothing but peaks, and counts in kibibytes, on macOS in bytes.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    import resource  # noqa: PLC0415 - not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
