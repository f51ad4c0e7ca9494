"""Four-bit storage in bitsandbytes' format: pack, decode, encode, plain and nested. Clauses: Q1 to Q7, for NF4.

Axes: N elements in row-major order, P packed bytes (two elements each), S blocks (a scale each), I in, O out. A weight
`W_OI` is stored as

    q_N = nibbles, packed high first         pack, unpack   (Q3)
    absmax_S = max |W| by blocks of 64       block_absmax   (Q1)
    W_N ~ code[q_N] * absmax_S[n // 64]      decode         (Q4)
    absmax_S ~ map8[q8_S] * absmax2 + offset when nested    (Q6)

Decoding is normative, to the bit, and is written for JAX: it may be jitted. Encoding is defined by profiles (Q5), on
the bits of concrete values and with exact comparisons that need float64 whatever JAX is set to: it is written in numpy.
"""

import math
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from ref.codebooks import DYNAMIC_CODE, NF4_CODE
from ref.types import InputError, NestedState, QuantState

Profile: TypeAlias = Literal["exact", "bnb-cpu"]
"""Q5: which encoder. Both write what the same decoder reads; they round near ties differently."""

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Q1: the numbers of elements that may share one scale, as bitsandbytes has them."""

NESTED_BLOCKSIZE: Final = 256
"""Q6: the number of scales that share one scale of scales."""

ZERO_NIBBLE: Final = 7
"""Q3: the code of 0 in NF4, which fills the last byte of an odd count."""

SMALLEST_SCALE: Final = np.float32(1e-38)
"""Q5: what `bnb-cpu` puts for a smaller absmax before it divides, and stores for a short last block."""

BINS: Final = 65536
"""Q5: `bnb-cpu` looks 8-bit codes up in a table of this many equal bins of [-1, 1]."""


class QuantizationError(InputError):
    """A weight that cannot be quantised, or bytes that cannot be decoded: what, where, and the mend."""


# --- Q3: packing ---------------------------------------------------------------------------------------------------


def pack(q_N: UInt8[Array, " N"]) -> UInt8[Array, " P"]:
    """Q3: two codes a byte, element 0 in the high nibble; an odd count is filled up with the code of 0."""
    padded_N = jnp.pad(q_N, (0, q_N.shape[0] % 2), constant_values=ZERO_NIBBLE)

    return (padded_N[0::2] << 4) | padded_N[1::2]


def unpack(packed_P: UInt8[Array, " P"], *, count: int) -> UInt8[Array, " N"]:
    """Q3: the first `count` codes, high nibble first; bytes beyond them are the storage's filler."""
    return jnp.stack([packed_P >> 4, packed_P & 15], axis=1).reshape(-1)[:count]


# --- Q4: decoding --------------------------------------------------------------------------------------------------


def decode(packed: UInt8[Array, "..."], state: QuantState, *, dtype: DTypeLike | None = None) -> Array:
    """Q4: the weight that the bytes stand for, `code[q] * absmax` in float32, then one cast to `dtype`.

    Bit for bit what bitsandbytes gives on CPU, eager or jitted, wherever each product is 0 or at least 2^-126 in
    magnitude: XLA on CPU reads and writes smaller numbers as 0.

    Args:
        packed: at least ceil(N / 2) bytes, in any shape; more are the storage's filler (Q3).
        state: the scales and how to read them.
        dtype: of the result; `state.dtype` if not given.

    Returns:
        The weight, of shape `state.shape`.

    Raises:
        QuantizationError: where there are too few bytes or too few scales for the shape.
    """
    count = math.prod(state.shape)
    _require_enough("bytes", packed.size, (count + 1) // 2)
    _require_enough("scales", state.absmax.size, -(-count // state.blocksize))

    q_N = unpack(packed.reshape(-1)[: (count + 1) // 2], count=count)
    absmax_N = jnp.repeat(decode_absmax(state), state.blocksize)[:count]
    W_N = rounded_product(state.code[q_N], absmax_N)

    return W_N.reshape(state.shape).astype(state.dtype if dtype is None else dtype)


def decode_absmax(state: QuantState) -> Float[Array, " S"]:
    """Q4, Q6: the scale of each block, `map8[q8] * absmax2 + offset` with two roundings when nested."""
    nested = state.nested
    if nested is None:
        return state.absmax

    absmax2_S = jnp.repeat(nested.absmax, nested.blocksize)[: state.absmax.shape[0]]

    return rounded_product(nested.code[state.absmax], absmax2_S) + nested.offset


def rounded_product(a: Float[Array, " N"], b: Float[Array, " N"]) -> Float[Array, " N"]:
    """Q4: `a * b`, rounded before anything is added to it.

    Compiled for CPU, `a * b + c` becomes a fused multiply-add, which rounds once; barriers and `reduce_precision` are
    dropped before that happens. No compiler fuses through a magnitude: so the product's is taken, and its sign put back
    from the factors', which holds for every a and b.
    """
    magnitude_N = jnp.abs(a * b)

    return jnp.where(jnp.signbit(a) ^ jnp.signbit(b), -magnitude_N, magnitude_N)


def _require_enough(what: str, came: int, wanted: int) -> None:
    if came < wanted:
        raise QuantizationError(
            f"{came} {what} came, the shape needs {wanted}", hint="give the whole tensor and its state"
        )


# --- Q5: encoding --------------------------------------------------------------------------------------------------


def encode(
    W: Float[Array | np.ndarray, "..."],
    *,
    blocksize: int = 64,
    profile: Profile = "exact",
    nested: bool = False,
    offset: float | None = None,
) -> tuple[UInt8[Array, " P"], QuantState]:
    """Q5: the packed bytes and the state of a weight in float32, bf16 or float16.

    `exact` takes the code nearest to `w / absmax` in exact arithmetic, the lower one of two equally near. `bnb-cpu`
    gives the bytes and scales of bitsandbytes 0.50 on CPU, to the bit. Not for jit: it looks at the values.

    Args:
        W: of any shape; blocks run over its row-major flattening (Q1).
        blocksize: how many elements share a scale.
        profile: `exact` or `bnb-cpu`.
        nested: whether to code the scales in 8 bits as well (Q6).
        offset: what to take off the scales before coding them, when nested; their mean, rounded once, if not given.
            bitsandbytes' mean depends on the order in which torch sums: give it its own to have its codes (Q4).

    Raises:
        QuantizationError: a value that is not finite, with its index (Q7); an empty weight, another dtype, an unknown
            blocksize or profile.
    """
    W_N = _validated(np.asarray(W), blocksize, profile).reshape(-1)
    nibbles, codes = _PROFILES[profile]

    absmax_S = block_absmax(W_N, blocksize)
    q_N, absmax_S = nibbles(W_N, absmax_S, blocksize)
    stored_S, nested_state = _encode_scales(absmax_S, offset, codes) if nested else (absmax_S, None)

    state = QuantState(
        absmax=jnp.asarray(stored_S),
        code=jnp.asarray(NF4_CODE),
        nested=nested_state,
        blocksize=blocksize,
        shape=tuple(np.shape(W)),
        dtype=str(np.asarray(W).dtype),
    )
    return pack(jnp.asarray(q_N)), state


def block_absmax(values_N: NDArray[np.float32], blocksize: int) -> NDArray[np.float32]:
    """Q1: the largest magnitude in each block of the row-major flattening, the last of which may be short."""
    return np.maximum.reduceat(np.abs(values_N), np.arange(0, values_N.size, blocksize))


def nearest(
    values_N: NDArray[np.float32], scale_N: NDArray[np.float32], code: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Q5, `exact`: the code nearest to each value over its scale, the lower of two at the same distance.

    It is the number of middles between neighbouring codes that lie strictly below v / s, and float64 decides that
    exactly: a middle m has at most 28 bits and s has 24, so v and m s, where they differ, do so by 2^-52 or more of
    their size, and the quotient's rounding moves it by 2^-53 of that at most, never past m. (Over a scale of 0 every
    value is 0.)
    """
    middles = (code[:-1].astype(np.float64) + code[1:]) / 2
    quotient_N = values_N.astype(np.float64) / np.where(scale_N == 0, 1, scale_N)

    return np.searchsorted(middles, quotient_N, side="left").astype(np.uint8)


def _exact_nibbles(
    W_N: NDArray[np.float32], absmax_S: NDArray[np.float32], blocksize: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Q5, `exact`: nibbles, and the scales as they were."""
    return nearest(W_N, _each(absmax_S, blocksize, W_N.size), NF4_CODE), absmax_S


def _exact_codes(residual_S: NDArray[np.float32], absmax2: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Q5, Q6, `exact`: 8-bit codes of scales."""
    return nearest(residual_S, _each(absmax2, NESTED_BLOCKSIZE, residual_S.size), DYNAMIC_CODE)


def _bnb_cpu_nibbles(
    W_N: NDArray[np.float32], absmax_S: NDArray[np.float32], blocksize: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Q5, `bnb-cpu`: times the reciprocal in whole blocks, divided in a short last one, whose scale is stored above 0.

    Then the number of middles, themselves rounded to float32, that lie strictly below.
    """
    whole = W_N.size - W_N.size % blocksize
    safe_S = np.maximum(absmax_S, SMALLEST_SCALE)
    reciprocal_N = _each(np.float32(1) / safe_S, blocksize, whole)
    scaled_N = np.concatenate([W_N[:whole] * reciprocal_N, W_N[whole:] / safe_S[-1]])
    middles = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
    q_N = np.searchsorted(middles, np.clip(scaled_N, -1, 1), side="left").astype(np.uint8)

    return q_N, np.concatenate([absmax_S[: whole // blocksize], safe_S[whole // blocksize :]])


def _bnb_cpu_codes(residual_S: NDArray[np.float32], absmax2: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Q5, Q6, `bnb-cpu`: times the reciprocal, to the bin of [-1, 1] that it falls in, to that bin's code.

    A block of zeros gets code 0, not that of the value 0; its scale is 0, so it decodes to the offset all the same.
    (Compiled code may fuse the last multiply and add of the bin: wherever the table changes, the code is the same.)
    """
    middles = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / np.float32(2)
    bin_values = np.float32(-1) + np.float32(2) * np.arange(BINS, dtype=np.float32) / np.float32(BINS - 1)
    table = np.searchsorted(middles, bin_values, side="left").astype(np.uint8)

    scale_S = _each(absmax2, NESTED_BLOCKSIZE, residual_S.size)
    scaled_S = np.clip(residual_S * (np.float32(1) / np.where(scale_S == 0, 1, scale_S)), -1, 1)
    bins_S = ((scaled_S + np.float32(1)) * np.float32(0.5) * np.float32(BINS - 1) + np.float32(0.5)).astype(np.int64)

    return np.where(scale_S == 0, 0, table[bins_S]).astype(np.uint8)


_PROFILES: Final = {"exact": (_exact_nibbles, _exact_codes), "bnb-cpu": (_bnb_cpu_nibbles, _bnb_cpu_codes)}


def _encode_scales(
    absmax_S: NDArray[np.float32], offset: float | None, codes: Callable[..., NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], NestedState]:
    """Q6: the scales less their mean, in blocks of 256 with a scale each, as 8-bit codes of the dynamic map."""
    offset32 = np.float32(absmax_S.mean(dtype=np.float64) if offset is None else offset)
    residual_S = absmax_S - offset32
    absmax2 = block_absmax(residual_S, NESTED_BLOCKSIZE)
    q8_S = codes(residual_S, absmax2)

    nested = NestedState(
        absmax=jnp.asarray(absmax2),
        code=jnp.asarray(DYNAMIC_CODE),
        offset=jnp.asarray(offset32),
        blocksize=NESTED_BLOCKSIZE,
    )
    return q8_S, nested


def _each(scale_S: NDArray[np.float32], blocksize: int, count: int) -> NDArray[np.float32]:
    """Every element's scale."""
    return np.repeat(scale_S, blocksize)[:count]


def _validated(W: np.ndarray, blocksize: int, profile: str) -> NDArray[np.float32]:
    """Q7: the weight in float32, once it is known that encoding means something."""
    if profile not in _PROFILES:
        raise QuantizationError(f"profile {profile!r} is unknown", hint=f"give one of {', '.join(_PROFILES)}")
    if blocksize not in BLOCKSIZES:
        raise QuantizationError(
            f"blocksize {blocksize} is unknown", hint=f"give one of {', '.join(map(str, BLOCKSIZES))}"
        )
    if str(W.dtype) not in ("float32", "bfloat16", "float16"):
        raise QuantizationError(f"a weight in {W.dtype} has no four-bit form", hint="cast it to float32 first")
    if W.size == 0:
        raise QuantizationError(f"a weight of shape {W.shape} is empty", hint="leave it as it is")
    bad = np.argwhere(~np.isfinite(W))
    if len(bad):
        index = tuple(int(i) for i in bad[0])
        raise QuantizationError(
            f"the value at index {index} is {W[index]}", hint="mend the weight; nested, it would spoil all of it"
        )

    return W.astype(np.float32)
