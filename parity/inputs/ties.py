"""Weights on which rounding decides: the midpoints between two NF4 codes, and their float32 neighbours (Q5).

Every block holds a 1, so that its absmax is 1 and the other numbers are compared with the midpoints as they stand.
"""

from __future__ import annotations

import numpy as np

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
"""The codebook (Q2), bitsandbytes' float32 values; a test holds it to the reference's."""
_BLOCK = 64


def tied_weight(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw midpoints and neighbours, with a 1 at the head of every block; float32, (out, in)."""
    midpoints = (NF4[1:] + NF4[:-1]) / np.float32(2)
    below, above = (np.nextafter(midpoints, np.float32(side)) for side in (-np.inf, np.inf))
    weight = generator.choice(np.concatenate([midpoints, below, above]), size=shape).astype(np.float32)
    weight.reshape(-1)[::_BLOCK] = 1.0
    return weight
