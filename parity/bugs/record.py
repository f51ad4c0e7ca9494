"""One record a bug: what it is, whom it hurt, what it violates, which checks must see it, and what it looks like.

Flags, plans, diagnosis, README's count and the report are made from these. Imports no framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

GRADIENTS = (("gradient", "lora_A"), ("gradient", "lora_B"), ("gradient", "magnitude"))
"""(kind, tensor's last word) of an adapter's gradients."""
MOMENTS = tuple(
    (f"optimizer:{name}", leaf) for name in ("exp_avg", "exp_avg_sq") for leaf in ("lora_A", "lora_B", "magnitude")
)
"""AdamW's state of an adapter."""


class Signature(Enum):
    """What the wrong shards of a failed case have in common, in words for the reader."""

    PLACES = "a rank holds another part than S1 and S2 give it"
    WORLD_TIMES = "gradients are the world size too large (S3)"
    REPLICAS_TIMES = "gradients are the number of replicas too large (S9)"
    ONE_RANK_HALF = "one rank has half of its gradient"
    MAGNITUDES_ALONE = "only magnitude gradients are wrong (S11)"
    MATRICES_ALONE = "A and B are wrong and magnitudes right, as when the norm is differentiated (D5)"
    CODES = "the 4-bit codec differs (Q3 to Q5)"


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A bug that somebody shipped, or that sharding invites; the mutant of that name has it."""

    name: str
    """As SPEC.md and reports cite it."""
    bug: str
    """What the code does."""
    effect: str
    """What a user gets."""
    source: str
    """Where it was seen, or what invites it."""
    clauses: tuple[str, ...]
    """What it violates."""
    keep: str
    """The cases of the quick tier that the mutant is tried on, as `-k` has them."""
    kills: tuple[tuple[str, str], ...]
    """(kind, tensor's last word) of checks that must fail, each at least once. A pair that is missing is right in spite
    of the bug: `dm` of the last layer under NormNotDetached, A under AlignmentIgnored (the first member needs no
    filler), A and B where only magnitudes are hurt."""
    subject: str = "torch_impl"
    """The implementation that has it."""
    signature: Signature | None = None
    """What a failure that it causes looks like, where that can be told."""
