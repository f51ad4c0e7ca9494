"""Files that one side writes and the other reads (C1, C2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from parity.case.base import Model, Task, Tolerance
from parity.case.stack import StackCase


@dataclass(frozen=True, kw_only=True)
class ExchangeCase(StackCase):
    """Adapter files (C1)."""

    task: ClassVar[Task] = "exchange"

    direction: Literal["written", "read"] = "written"
    """Whether the subject writes what the reference reads, or reads what the reference wrote."""

    @property
    def tolerance(self) -> Tolerance:
        """What was read is what went in."""
        return "bits"

    @property
    def _word(self) -> str:
        return "files"

    @property
    def _said_first(self) -> tuple[str, ...]:
        return (self.direction,)


@dataclass(frozen=True, kw_only=True)
class CheckpointCase(ExchangeCase):
    """A packed checkpoint, which transformers and bitsandbytes write and both sides read (C2)."""

    model: ClassVar[Model] = "checkpoint"

    direction: Literal["written", "read"] = field(init=False, default="written")
    storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8"
    """What the packed bytes are seen as (Q3)."""
