"""The fast twins of `quant`: NF4 encoding and decoding, compiled. Clauses: Q4, Q5 (profile `bnb-cpu`).

Axes: N elements in row-major order, P packed bytes, S blocks, H pairs of a block. Bit for bit what `quant.encode` and
`quant.decode` give, in the scope of Q4 (no subnormal numbers); of a 4096 x 4096 weight on two cores in 7 and 18 ms,
where bitsandbytes takes 220 and 15 (measured).

What makes the difference: a block is viewed as pairs, so that a byte is made of two neighbours in one register, and the
fifteen comparisons with middles are summed, which compiles to vector instructions where a search does not.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from ref.codebooks import NF4_CODE
from ref.encoders import PROFILES, SMALLEST_SCALE
from ref.quant import (
    BLOCKSIZES,
    QuantizationError,
    decode_absmax,
    encode_scales,
    pack,
    require_scales,
    rounded_product,
)
from ref.types import QuantState


def encode_nf4(
    W: Float[Array, "..."], *, blocksize: int = 64, nested: bool = False
) -> tuple[UInt8[Array, " P"], QuantState]:
    """Q5: `quant.encode(W, profile="bnb-cpu", nested=nested)`, compiled once a shape; nested scales are coded by it.

    Raises:
        QuantizationError: a value that is not finite (Q7), an empty weight, another dtype or an unknown blocksize.
    """
    if blocksize not in BLOCKSIZES or W.size == 0 or str(W.dtype) not in ("float32", "bfloat16", "float16"):
        raise QuantizationError(
            f"a weight of shape {W.shape} in {W.dtype}, blocksize {blocksize}", hint="see quant.encode, which says why"
        )
    packed, absmax_S = _encode(W, blocksize=blocksize)
    if not bool(jnp.all(jnp.isfinite(absmax_S))):
        block = int(jnp.argmin(jnp.isfinite(absmax_S)))
        raise QuantizationError(
            f"a value from index {block * blocksize} on, in row-major order, is not finite", hint="mend the weight"
        )
    stored_S, state = encode_scales(np.asarray(absmax_S), None, PROFILES["bnb-cpu"]) if nested else (absmax_S, None)
    code = jnp.asarray(NF4_CODE)

    return packed, QuantState(
        jnp.asarray(stored_S), code, state, blocksize=blocksize, shape=W.shape, dtype=str(W.dtype)
    )


@partial(jax.jit, static_argnames="blocksize")
def _encode(W: Float[Array, "..."], *, blocksize: int) -> tuple[UInt8[Array, " P"], Float[Array, " S"]]:
    """Whole blocks by their reciprocal, a short last one by division: see `encoders`."""
    W_N = W.reshape(-1).astype(jnp.float32)
    whole = W_N.size - W_N.size % blocksize
    pairs_SH2 = W_N[:whole].reshape(-1, blocksize // 2, 2)
    absmax_S = jnp.max(jnp.abs(pairs_SH2), axis=(1, 2))
    reciprocal_S1 = (1 / jnp.maximum(absmax_S, SMALLEST_SCALE))[:, None]
    high_SH, low_SH = (_nibbles(pairs_SH2[:, :, side] * reciprocal_S1) for side in (0, 1))
    packed_P = ((high_SH << 4) | low_SH).reshape(-1)
    if whole == W_N.size:
        return packed_P, absmax_S

    scale = jnp.maximum(jnp.max(jnp.abs(W_N[whole:])), SMALLEST_SCALE)
    rest_P = pack(_nibbles(W_N[whole:] / scale))

    return jnp.concatenate([packed_P, rest_P]), jnp.concatenate([absmax_S, scale[None]])


def _nibbles(scaled: Float[Array, "*N"]) -> UInt8[Array, "*N"]:
    """How many middles lie strictly below; the sum of comparisons is what the compiler turns into vector code."""
    middles = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)

    return sum((scaled > middle).astype(jnp.uint8) for middle in middles[1:]) + (scaled > middles[0]).astype(jnp.uint8)


def decode(packed: UInt8[Array, "..."], state: QuantState, *, dtype: DTypeLike | None = None) -> Array:
    """Q4: `quant.decode`, of either codebook, plain or nested, compiled once a shape.

    Raises:
        QuantizationError: where there are too few bytes or too few scales for the shape.
    """
    require_scales(packed, state)

    return _decode(packed, state, dtype=jnp.dtype(state.dtype if dtype is None else dtype))


@partial(jax.jit, static_argnames="dtype")
def _decode(packed: UInt8[Array, "..."], state: QuantState, *, dtype: jnp.dtype) -> Array:
    """Whole blocks with their scale once a block, and none repeated; then the short last one."""
    count = math.prod(state.shape)
    whole = count // state.blocksize
    absmax_S, bytes_P = decode_absmax(state), packed.reshape(-1)
    W_N = _looked_up(
        bytes_P[: whole * state.blocksize // 2].reshape(whole, state.blocksize // 2), absmax_S[:whole], state.code
    )
    if rest := count - whole * state.blocksize:
        rest_P = bytes_P[whole * state.blocksize // 2 :][: (rest + 1) // 2]
        W_N = jnp.concatenate([W_N, _looked_up(rest_P[None, :], absmax_S[whole:][:1], state.code)[:rest]])

    return W_N.reshape(state.shape).astype(dtype)


def _looked_up(
    bytes_SH: UInt8[Array, "S H"], absmax_S: Float[Array, " S"], code: Float[Array, "16"]
) -> Float[Array, " N"]:
    """Every nibble's value times its block's scale, high nibble first, rounded (Q4)."""
    scale_SH = jnp.broadcast_to(absmax_S[:, None], bytes_SH.shape)
    halves = [rounded_product(code[q_SH], scale_SH) for q_SH in (bytes_SH >> 4, bytes_SH & 15)]

    return jnp.stack(halves, axis=-1).reshape(-1)
