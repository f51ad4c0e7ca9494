"""How long named parts of a phase take, wherever they run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_spent: defaultdict[str, float] = defaultdict(float)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time of the body to a name; `take_times` reads and clears them."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _spent[name] += time.perf_counter() - start


def take_times() -> dict[str, float]:
    """Seconds by name since the last call."""
    times = dict(_spent)
    _spent.clear()
    return times
