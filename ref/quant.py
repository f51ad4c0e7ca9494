"""Four-bit storage in bitsandbytes' format: pack, decode, encode, plain and nested. Clauses: Q1 to Q8.

Axes: N elements in row-major order, P packed bytes (two elements each), S blocks (a scale each), I in, O out. A weight
`W_OI` is stored as

    q_N = nibbles, packed high first         pack, unpack   (Q3)
    absmax_S = max |W| by blocks of 64       block_absmax   (Q1)
    W_N ~ code[q_N] * absmax_S[n // 64]      decode         (Q4)
    absmax_S ~ map8[q8_S] * absmax2 + offset when nested    (Q6)

Decoding is normative, to the bit, and is written for JAX: it may be jitted. Encoding is defined by profiles (Q5), which
stand in `encoders`. `quant_fast` has the fast twins of both.
"""

import math
from typing import Final

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from ref.codebooks import DYNAMIC_CODE, FP4_CODE, NF4_CODE
from ref.encoders import NESTED_BLOCKSIZE, PROFILES, Encoder, Profile, QuantType, block_absmax
from ref.types import InputError, NestedState, QuantState

CODES: Final[dict[QuantType, NDArray[np.float32]]] = {"nf4": NF4_CODE, "fp4": FP4_CODE}
"""Q2: the codebook of each kind."""

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Q1: the numbers of elements that may share one scale, as bitsandbytes has them."""

ZERO_NIBBLE: Final[dict[QuantType, int]] = {"nf4": 7, "fp4": 0}
"""Q3: the code of 0, which fills the last byte of an odd count."""


class QuantizationError(InputError):
    """A weight that cannot be quantised, or bytes that cannot be decoded: what, where, and the mend."""


# --- Q3: packing ---------------------------------------------------------------------------------------------------


def pack(q_N: UInt8[Array, " N"], *, quant_type: QuantType = "nf4") -> UInt8[Array, " P"]:
    """Q3: two codes a byte, element 0 in the high nibble; an odd count is filled up with the code of 0."""
    padded_N = jnp.pad(q_N, (0, q_N.shape[0] % 2), constant_values=ZERO_NIBBLE[quant_type])

    return (padded_N[0::2] << 4) | padded_N[1::2]


def unpack(packed_P: UInt8[Array, " P"], *, count: int) -> UInt8[Array, " N"]:
    """Q3: the first `count` codes, high nibble first; bytes beyond them are the storage's filler."""
    return jnp.stack([packed_P >> 4, packed_P & 15], axis=1).reshape(-1)[:count]


# --- Q4: decoding --------------------------------------------------------------------------------------------------


def decode(packed: UInt8[Array, "..."], state: QuantState, *, dtype: DTypeLike | None = None) -> Array:
    """Q4: the weight that the bytes stand for, `code[q] * absmax` in float32, then one cast to `dtype`.

    Bit for bit what bitsandbytes gives on CPU, eager or jitted, wherever each product is 0 or at least 2^-126 in
    magnitude: XLA on CPU reads and writes smaller numbers as 0. (Where its AVX-512 decoder departs from itself, SPEC.md
    says how, under Q1 and Q4.)

    Args:
        packed: at least ceil(N / 2) bytes, in any shape; more are the storage's filler (Q3).
        state: the scales and how to read them.
        dtype: of the result; `state.dtype` if not given.

    Returns:
        The weight, of shape `state.shape`.

    Raises:
        QuantizationError: where there are too few bytes or too few scales for the shape.
    """
    require_scales(packed, state)
    count = math.prod(state.shape)

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


def rounded_product(a: Float[Array, "*N"], b: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Q4: `a * b`, rounded before anything is added to it.

    Compiled for CPU, `a * b + c` becomes a fused multiply-add, which rounds once; barriers and `reduce_precision` are
    dropped before that happens. No compiler fuses through a magnitude: so the product's is taken, and its sign put back
    from the factors', which holds for every a and b.
    """
    magnitude_N = jnp.abs(a * b)

    return jnp.where(jnp.signbit(a) ^ jnp.signbit(b), -magnitude_N, magnitude_N)


def require_known_code(code: Float[Array | np.ndarray, " C"]) -> QuantType:
    """Q8: which of bitsandbytes' two codebooks this is, to the bit; a near one belongs to another format.

    Raises:
        QuantizationError: where it is neither: torchao's NF4 table, of four decimals, decodes to other numbers.
    """
    for quant_type, known in CODES.items():
        if np.asarray(code).tobytes() == known.tobytes():
            return quant_type

    raise QuantizationError("the codebook is not bitsandbytes'", hint="quantise anew from the unquantised weight")


def require_scales(packed: UInt8[Array, "..."], state: QuantState) -> None:
    """Q4: that there are bytes and scales enough for the shape, or a QuantizationError."""
    count = math.prod(state.shape)
    _require_enough("bytes", packed.size, (count + 1) // 2)
    _require_enough("scales", state.absmax.size, -(-count // state.blocksize))


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
    quant_type: QuantType = "nf4",
    profile: Profile = "exact",
    nested: bool = False,
    offset: float | None = None,
) -> tuple[UInt8[Array, " P"], QuantState]:
    """Q5: the packed bytes and the state of a weight in float32, bf16 or float16.

    `exact` takes the code nearest to `w / absmax` in exact arithmetic, the lower one of two equally near. `bnb-cpu`
    gives the bytes and scales of bitsandbytes 0.50 on CPU, to the bit; `bnb-cuda` those of its CUDA kernels as their
    source reads, which nobody has run here. Not for jit: it looks at the values.

    Args:
        W: of any shape; blocks run over its row-major flattening (Q1).
        blocksize: how many elements share a scale.
        quant_type: `nf4` or `fp4`.
        profile: `exact`, `bnb-cpu` or `bnb-cuda`.
        nested: whether to code the scales in 8 bits as well (Q6).
        offset: what to take off the scales before coding them, when nested; their mean, rounded once, if not given.
            bitsandbytes' mean depends on the order in which torch sums: give it its own to have its codes (Q4).

    Raises:
        QuantizationError: a value that is not finite, with its index (Q7); an empty weight, another dtype, an unknown
            blocksize or profile.
    """
    W_N = _validated(np.asarray(W), blocksize, profile, quant_type).reshape(-1)
    encoder = PROFILES[profile]

    q_N, absmax_S = encoder.nibbles(W_N, block_absmax(W_N, blocksize), blocksize, CODES[quant_type])
    stored_S, nested_state = encode_scales(absmax_S, offset, encoder) if nested else (absmax_S, None)

    state = QuantState(
        absmax=jnp.asarray(stored_S),
        code=jnp.asarray(CODES[quant_type]),
        nested=nested_state,
        blocksize=blocksize,
        shape=tuple(np.shape(W)),
        dtype=str(np.asarray(W).dtype),
    )
    return pack(jnp.asarray(q_N), quant_type=quant_type), state


def encode_scales(
    absmax_S: NDArray[np.float32], offset: float | None, encoder: Encoder
) -> tuple[NDArray[np.uint8], NestedState]:
    """Q6: the scales less their mean, in blocks of 256 with a scale each, as 8-bit codes of the dynamic map."""
    offset32 = np.float32(absmax_S.mean(dtype=np.float64) if offset is None else offset)
    residual_S = absmax_S - offset32
    absmax2 = block_absmax(residual_S, NESTED_BLOCKSIZE)
    q8_S = encoder.codes(residual_S, absmax2)

    nested = NestedState(
        absmax=jnp.asarray(absmax2),
        code=jnp.asarray(DYNAMIC_CODE),
        offset=jnp.asarray(offset32),
        blocksize=NESTED_BLOCKSIZE,
    )
    return q8_S, nested


def _validated(W: np.ndarray, blocksize: int, profile: str, quant_type: str) -> NDArray[np.float32]:
    """Q7: the weight in float32, once it is known that encoding means something."""
    for name, value, known in (
        ("profile", profile, PROFILES),
        ("blocksize", blocksize, BLOCKSIZES),
        ("quant_type", quant_type, CODES),
    ):
        if value not in known:
            raise QuantizationError(f"{name} {value!r} is unknown", hint=f"give one of {', '.join(map(str, known))}")
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
