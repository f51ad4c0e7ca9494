"""How tokens are dealt to ranks: a run each, unequal (S3), and none empty where there are enough."""

from __future__ import annotations

import numpy as np


def deal_tokens(tokens: int, world: int) -> list[slice]:
    """Every rank gets one where there are enough; of the others rank k gets a share of k + 2."""
    least = 1 if tokens >= world else 0
    shares = np.arange(2, world + 2)
    rest = np.floor(np.cumsum(shares) / shares.sum() * (tokens - least * world) + 0.5).astype(int)
    ends = rest + least * np.arange(1, world + 1)
    starts = np.concatenate([[0], ends[:-1]])
    return [slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
