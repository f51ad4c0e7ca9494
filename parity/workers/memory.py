"""How much memory a rank may have: its share of the machine, so that a subject that takes all ends itself alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

GIB = 2**30
_SHARE = 0.7
"""Of the machine's memory, for all ranks of a world together: the judge and the oracle need some as well."""
_LEAST = 4 * GIB
"""What a rank may have however many there are: torch alone takes one of it."""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def rank_memory(world: int) -> int:
    """Bytes that each of `world` ranks may have."""
    return max(_LEAST, int(_SHARE * _machine_memory() / world))


def limit_memory(most_bytes: int) -> None:
    """Hold this process to it: an allocation beyond fails, as a MemoryError, and no other process is harmed."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    least = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (least, least))


def give_back() -> None:
    """Return what a large question has left to the system: cycles of modules, and the allocator's free pages."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes that this process holds; 0 where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch and C++ say so in words of their own."""
    words = ("can't allocate memory", "std::bad_alloc")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _machine_memory() -> int:
    """The machine's, or what a container leaves of it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CGROUP_LIMITS:
        text = path.read_text(encoding="ascii").strip() if path.exists() else ""
        memory = min(memory, int(text)) if text.isdigit() else memory
    return memory
