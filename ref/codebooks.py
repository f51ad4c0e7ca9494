"""The tables of bitsandbytes' storage formats, each with its construction. Clauses: Q2 (NF4, FP4), Q6 (dynamic map).

A codebook holds the values, in [-1, 1], that codes stand for; code k stands for entry k. All but FP4's ascend. The
tables themselves are normative: where a construction and a table differ in a last bit, the table is right.
"""

from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

NF4_CODE: Final = np.array(
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
"""Q2: the 16 values of NormalFloat4, from QLoRA (arXiv:2305.14314, appendix E), as bitsandbytes has them."""

NF4_OUTERMOST: Final = 0.9677083
"""The probability below the outermost quantile, as the source rounds it: 1 - (1/32 + 1/30) / 2, the mean of leaving out
half a bin of 16 and half a bin of 15."""

FP4_TWELFTHS: Final = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Q2: the magnitudes of FP4 in twelfths, in the order of its codes' lower three bits. The fourth bit is the sign."""

FP4_CODE: Final = np.array([*FP4_TWELFTHS, *(0 - twelfths for twelfths in FP4_TWELFTHS)], np.float32) / np.float32(12)
"""Q2: the 16 values of bitsandbytes' FP4, which is not OCP's E2M1. Code 8 stands for 0 as well, of no sign in
the table; CUDA's kernel gives it one."""

DYNAMIC_DECADES: Final = 7
"""Q6: the dynamic map's magnitudes run over this many powers of ten."""


def nf4_from_quantiles() -> NDArray[np.float64]:
    """Q2: the NF4 values derived anew; within 1.1e-7 of `NF4_CODE`, and rounding to it in 6 of 16 places.

    Eight positive and seven negative quantiles of the standard normal, at equal steps of probability from
    `NF4_OUTERMOST` to one half (whose quantile 0 both share), divided by the largest (arXiv:2305.14314, section 3).
    The table was made from probabilities in float32, hence the last bits.
    """
    normal = NormalDist()
    positive = [normal.inv_cdf(p) for p in np.linspace(NF4_OUTERMOST, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(NF4_OUTERMOST, 0.5, 8)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative]))

    return values / values.max()


def dynamic_map() -> NDArray[np.float32]:
    """Q6: the signed 8-bit dynamic map, bit for bit (arXiv:1511.04561, section 3.2, as bitsandbytes builds it).

    Decade k, up to 10^(k - 6), holds 2^k values of each sign: the middles of 2^k equal cells of [0.1, 1], scaled.
    With k = 0 to 6 that makes 254; 0 and 1 complete the 256. Every step is rounded to float32, borders once: on a
    processor without fused multiply-add, bitsandbytes' own table is another in some last bits.
    """
    magnitudes = np.concatenate([_decade(k) for k in range(DYNAMIC_DECADES)])
    values = np.concatenate([-magnitudes, magnitudes, np.array([0, 1], dtype=np.float32)])

    return np.sort(values)


def _decade(k: int) -> NDArray[np.float32]:
    """The 2^k positive values of one decade: cell borders counted from the nearer end, their middles, scaled.

    A border is rounded once, as by a fused multiply-add: float64 holds the product and the sum exactly.
    """
    cells = 2**k
    first, last = np.float32(0.1), np.float32(1)
    step = float((last - first) / np.float32(cells))
    index = np.arange(cells + 1)
    from_first, from_last = float(first) + step * index, float(last) - step * (cells - index)
    borders = np.where(index < (cells + 1) // 2, from_first, from_last).astype(np.float32)
    middles = (borders[:-1] + borders[1:]) / np.float32(2)

    return middles * np.float32(10.0 ** (k - DYNAMIC_DECADES + 1))


DYNAMIC_CODE: Final = dynamic_map()
"""Q6: the 256 values of the signed dynamic map, which nested block scales are coded in."""
