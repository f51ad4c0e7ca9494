"""The encoders of four-bit storage: which code each value gets. Clauses: Q1, Q5, Q6.

Axes: N elements in row-major order, S blocks. They are defined on the bits of concrete values, `exact` with comparisons
that need float64 whatever JAX is set to: they are written in numpy. A profile is an `Encoder`, and all write what the
same decoder reads:

    exact      the code nearest to w / absmax in exact arithmetic, the lower one of two equally near
    bnb-cpu    bitsandbytes 0.50 on CPU, to the bit
    bnb-cuda   its CUDA kernels as their source reads; never run here
"""

from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ref.codebooks import DYNAMIC_CODE

Profile: TypeAlias = Literal["exact", "bnb-cpu", "bnb-cuda"]
"""Q5: which encoder. All write what the same decoder reads; they round near ties, and code zero blocks, differently."""

QuantType: TypeAlias = Literal["nf4", "fp4"]
"""Q2: which codebook."""

NESTED_BLOCKSIZE: Final = 256
"""Q6: the number of scales that share one scale of scales."""

SMALLEST_SCALE: Final = np.float32(1e-38)
"""Q5: what `bnb-cpu` puts for a smaller absmax before it divides, and stores for a short last block."""

BINS: Final = 65536
"""Q5: `bnb-cpu` looks 8-bit codes up in a table of this many equal bins of [-1, 1]."""

CUDA_FP4_PIVOTS: Final = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)
"""Q5: between which magnitudes `bnb-cuda` divides FP4, as its kernel spells them: middles to six digits or more."""


class Encoder(NamedTuple):
    """Q5: one profile."""

    nibbles: Callable[..., tuple[NDArray[np.uint8], NDArray[np.float32]]]
    """Of elements, their blocks' absmax, the block size and the codebook: the codes, and the scales as stored."""

    codes: Callable[..., NDArray[np.uint8]]
    """Of scales less their mean, and the absmax of each 256 of those: the 8-bit codes (Q6)."""


def block_absmax(values_N: NDArray[np.float32], blocksize: int) -> NDArray[np.float32]:
    """Q1: the largest magnitude in each block of the row-major flattening, the last of which may be short."""
    return np.maximum.reduceat(np.abs(values_N), np.arange(0, values_N.size, blocksize))


def nearest(
    values_N: NDArray[np.float32], scale_N: NDArray[np.float32], code: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Q5, `exact`: the code nearest to each value over its scale, the lower of two at the same distance.

    It is the number of middles between neighbouring codes that lie strictly below v / s, and float64 decides that
    exactly: a middle m has at most 29 bits and s has 24, so that v and m s, as integers, differ by 1 where they differ;
    v / s is then 2^-24 or more away from m, and no float64 lies between m and there. (Over a scale of 0 every value is
    0.) Where two codes stand for the same value, as FP4's for 0 and -0, the first has it.
    """
    values, first = np.unique(code, return_index=True)
    middles = (values[:-1].astype(np.float64) + values[1:]) / 2
    quotient_N = values_N.astype(np.float64) / np.where(scale_N == 0, 1, scale_N)

    return first[np.searchsorted(middles, quotient_N, side="left")].astype(np.uint8)


def _exact_nibbles(
    W_N: NDArray[np.float32], absmax_S: NDArray[np.float32], blocksize: int, code: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Q5, `exact`: nibbles, and the scales as they were."""
    return nearest(W_N, _each(absmax_S, blocksize, W_N.size), code), absmax_S


def _exact_codes(residual_S: NDArray[np.float32], absmax2: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Q5, Q6, `exact`: 8-bit codes of scales."""
    return nearest(residual_S, _each(absmax2, NESTED_BLOCKSIZE, residual_S.size), DYNAMIC_CODE)


def _bnb_cpu_nibbles(
    W_N: NDArray[np.float32], absmax_S: NDArray[np.float32], blocksize: int, code: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Q5, `bnb-cpu`: times the reciprocal in whole blocks, divided in a short last one, whose scale is stored above 0.

    Then the number of middles, themselves rounded to float32, that lie strictly below; in FP4, 0 and -0 have a middle
    between them as well, so that small positive values get the code of -0.
    """
    whole = W_N.size - W_N.size % blocksize
    safe_S = np.maximum(absmax_S, SMALLEST_SCALE)
    reciprocal_N = _each(np.float32(1) / safe_S, blocksize, whole)
    scaled_N = np.concatenate([W_N[:whole] * reciprocal_N, W_N[whole:] / safe_S[-1]])
    order = np.lexsort([code])  # equal values stay in the order of their codes
    q_N = order[np.searchsorted(_middles(code[order]), np.clip(scaled_N, -1, 1), side="left")].astype(np.uint8)

    return q_N, np.concatenate([absmax_S[: whole // blocksize], safe_S[whole // blocksize :]])


def _bnb_cpu_codes(residual_S: NDArray[np.float32], absmax2: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Q5, Q6, `bnb-cpu`: times the reciprocal, to the bin of [-1, 1] that it falls in, to that bin's code.

    A block of zeros gets code 0, not that of the value 0; its scale is 0, so it decodes to the offset all the same.
    (Compiled code may fuse the last multiply and add of the bin: wherever the table changes, the code is the same.)
    """
    bin_values = np.float32(-1) + np.float32(2) * np.arange(BINS, dtype=np.float32) / np.float32(BINS - 1)
    table = np.searchsorted(_middles(DYNAMIC_CODE), bin_values, side="left").astype(np.uint8)

    scale_S = _each(absmax2, NESTED_BLOCKSIZE, residual_S.size)
    scaled_S = np.clip(residual_S * (np.float32(1) / np.where(scale_S == 0, 1, scale_S)), -1, 1)
    bins_S = ((scaled_S + np.float32(1)) * np.float32(0.5) * np.float32(BINS - 1) + np.float32(0.5)).astype(np.int64)

    return np.where(scale_S == 0, 0, table[bins_S]).astype(np.uint8)


def _bnb_cuda_nibbles(
    W_N: NDArray[np.float32], absmax_S: NDArray[np.float32], blocksize: int, code: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Q5, `bnb-cuda`: times the reciprocal in every block, then the pivots strictly below.

    In a block of zeros that is 0 times infinity: no pivot is below, and all get code 0, which in NF4 decodes to -0.0.
    Source: bitsandbytes' `kQuantizeBlockwise`, `dQuantizeNF4`, `dQuantizeFP4`. They are compiled with approximate
    division where this has the correctly rounded one: another reason why the profile rests on source until it is run.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled_N = W_N * _each(np.float32(1) / absmax_S, blocksize, W_N.size)
    if code[0] == 0:  # FP4: sign and magnitude
        ranks = np.argsort(code[:8], stable=True)
        q_N = ranks[_below(CUDA_FP4_PIVOTS, np.abs(scaled_N))] + np.where(scaled_N < 0, 8, 0)
    else:
        q_N = _below(_middles(code), scaled_N)

    return q_N.astype(np.uint8), absmax_S


def _bnb_cuda_codes(residual_S: NDArray[np.float32], absmax2: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Q5, Q6, `bnb-cuda`: the nearest code by middles rounded to float32, the even one of two equally near.

    Source: `dQuantize`, whose search always ends on an even code and then looks to either side. In a block of zeros (0
    times infinity) it ends on code 0.
    """
    middles = _middles(DYNAMIC_CODE)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled_S = residual_S * (np.float32(1) / _each(absmax2, NESTED_BLOCKSIZE, residual_S.size))
    lower_S = _below(middles, scaled_S)
    tied_S = scaled_S == middles[np.minimum(lower_S, len(middles) - 1)]

    return (lower_S + (tied_S & (lower_S % 2 == 1))).astype(np.uint8)


PROFILES: Final[dict[Profile, Encoder]] = {
    "exact": Encoder(_exact_nibbles, _exact_codes),
    "bnb-cpu": Encoder(_bnb_cpu_nibbles, _bnb_cpu_codes),
    "bnb-cuda": Encoder(_bnb_cuda_nibbles, _bnb_cuda_codes),
}
"""Q5: the encoders by name."""


def _middles(ascending: NDArray[np.float32]) -> NDArray[np.float32]:
    """Halfway between neighbouring codes, rounded to float32."""
    return (ascending[:-1] + ascending[1:]) / np.float32(2)


def _below(pivots: NDArray[np.float32], values_N: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many pivots lie strictly below each value; none below a NaN."""
    return np.where(np.isnan(values_N), 0, np.searchsorted(pivots, values_N, side="left"))


def _each(scale_S: NDArray[np.float32], blocksize: int, count: int) -> NDArray[np.float32]:
    """Every element's scale."""
    return np.repeat(scale_S, blocksize)[:count]
