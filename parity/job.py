"""What crosses between the pipeline and a worker: a job, the place where it runs, and a rank's answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.case import Case
from parity.fields import check_fields
from parity.printable import printable
from parity.shard import Shard

_UNITS = ("", "layer")


@dataclass(frozen=True)
class Place:
    """Where an implementation runs: its rank and what the machine offers."""

    rank: int
    world: int
    device: str
    model: Path | None
    """The pretrained checkpoint's directory, if there is one."""
    folder: Path | None = None
    """Where files lie that one side writes and the other reads (C1)."""


@dataclass(frozen=True)
class Job:
    """One case for one implementation, named so that it can be found inside a rank."""

    case: Case
    implementation: str
    folder: Path | None = None
    """The place's."""


def declared(implementation: Any) -> dict[str, Any]:
    """What an implementation says of itself; who says nothing gives what everyone owes."""
    return {"units": getattr(implementation, "units", ""), "gives": tuple(getattr(implementation, "gives", ()))}


@dataclass(frozen=True)
class RankAnswer:
    """What one rank gave."""

    shards: list[Shard]
    seconds: float
    refused: str | None = None
    units: str = ""
    """`layer` where the implementation declares the units of S7, so that its layout can be foretold."""
    gives: tuple[str, ...] = ()
    """The kinds of tensor that it declares beside those that everyone owes."""
    said: str = ""
    """What it said of what it was to refuse; empty where it took it."""

    def __post_init__(self) -> None:
        """Refuse what is no answer.

        Raises:
            TypeError: a field holds something else than it declares, or what is given is no shard.
        """
        check_fields(self, RankAnswer)
        odd = next((type(shard).__name__ for shard in self.shards if not isinstance(shard, Shard)), None)
        if odd:
            raise TypeError(f"it gave a {printable(odd)}, wanted a Shard")
        if self.units not in _UNITS:
            raise TypeError(f"it declares units {self.units!r}, wanted 'layer' or nothing")
