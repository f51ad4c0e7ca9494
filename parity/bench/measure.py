"""A comparison is a row: two things that took turns, the median of their ratios, and the limit it is held to."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Seconds = dict[str, list[float]]
"""For each contender, its time in each round."""


@dataclass(frozen=True)
class Row:
    """One comparison. `ours_s` and `peer_s` are medians, in seconds; `ratio` is the median of the rounds' ratios."""

    name: str
    ours_s: float
    peer_s: float
    ratio: float
    limit: float
    unit: str = "s"
    """`s`; `B` where the two are bytes of memory; empty where they are counts."""

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.ratio <= self.limit

    def as_json(self) -> dict[str, Any]:
        """The row as it is written and as a group's process sends it."""
        return {
            "name": self.name,
            "ours_s": self.ours_s,
            "peer_s": self.peer_s,
            "ratio": self.ratio,
            "limit": self.limit,
            "holds": self.holds,
            "unit": self.unit,
        }


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Run each contender once a round, and begin each round with another one, so that no one always comes first.

    Args:
        contenders: what to run, by name.
        rounds: how often each is timed.
        warmups: rounds before these that do not count (compilation, first use of memory).
        clock: the processor's time, which other work on the machine hardly touches, is what one thread's work takes;
            where several threads or processes work, `time.perf_counter`.
    """
    names = list(contenders)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(warmups + rounds):
        first = turn % len(names)
        for name in itertools.islice(itertools.cycle(names), first, first + len(names)):
            start = clock()
            contenders[name]()
            if turn >= warmups:
                seconds[name].append(clock() - start)
    return seconds


def compare(name: str, seconds: Seconds, *, ours: str, peer: str, limit: float) -> Row:
    """The row of two contenders that took turns."""
    ratios = [a / b for a, b in zip(seconds[ours], seconds[peer], strict=True)]
    return Row(
        name=name,
        ours_s=statistics.median(seconds[ours]),
        peer_s=statistics.median(seconds[peer]),
        ratio=statistics.median(ratios),
        limit=limit,
    )
