"""Strategies, a line each: what a rank holds of a model. Whoever asks how one shards, asks here.

Clauses: S1 (rows), S2 (flat parameters), S9 (replicas), S10 (tensor ranks).
"""

from dataclasses import dataclass
from typing import Literal

DataName = Literal["fsdp2", "fsdp1", "fsdp1-orig", "fsdp1-hybrid", "hsdp", "ddp", "none"]
"""Those in which every rank sees a batch of its own."""
StrategyName = Literal[DataName, "tp", "fsdp2-tp"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a model lies on its ranks."""

    cuts: bool
    """Whether a rank holds a part of each tensor, and gathers the whole for its use."""
    flat: bool = False
    """FSDP1: parts of a flattened unit (S2); otherwise ranges of each tensor's rows, by `fully_shard` (S1)."""
    keeps_originals: bool = False
    """FSDP1 with `use_orig_params=True`: parameters stay objects of their own."""
    replicates: bool = False
    """Whether there are several copies, whose gradients are reduced with each other's."""

    tensor: bool = False
    """Whether groups of ranks share each layer's features, and see the same batch."""

    @property
    def by_rows(self) -> bool:
        """Whether `fully_shard` cuts it."""
        return self.cuts and not self.flat

    @property
    def hybrid(self) -> bool:
        """S9: several copies, each cut over the ranks of a group."""
        return self.cuts and self.replicates

    @property
    def alone(self) -> bool:
        """Whether ranks share nothing."""
        return not (self.cuts or self.replicates or self.tensor)


STRATEGIES: dict[str, Strategy] = {
    "fsdp2": Strategy(cuts=True),
    "fsdp1": Strategy(cuts=True, flat=True),
    "fsdp1-orig": Strategy(cuts=True, flat=True, keeps_originals=True),
    "fsdp1-hybrid": Strategy(cuts=True, flat=True, replicates=True),
    "hsdp": Strategy(cuts=True, replicates=True),
    "ddp": Strategy(cuts=False, replicates=True),
    "tp": Strategy(cuts=False, tensor=True),
    "fsdp2-tp": Strategy(cuts=True, tensor=True),
    "none": Strategy(cuts=False),
}
"""By the names that `ShardConfig` takes, in the order in which they are listed."""
