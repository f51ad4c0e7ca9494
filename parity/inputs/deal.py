"""How tokens are dealt to ranks: a run each, unequal where there are several (S3)."""

from __future__ import annotations

import numpy as np


def deal_tokens(tokens: int, world: int) -> list[slice]:
    """Rank k gets a share of k + 2."""
    shares = np.arange(2, world + 2)
    ends = np.floor(np.cumsum(shares) / shares.sum() * tokens + 0.5).astype(int)
    starts = np.concatenate([[0], ends[:-1]])
    return [slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
