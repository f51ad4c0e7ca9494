"""The DoRA layer: scaling, direction, norm, magnitude, forward, merge. Clauses D1 to D13.

Axes: T tokens, I in, O out, R rank (the legend is in `types`). Every function of the layer takes the same steps:

    V = W + s B A              direction     (D1, D2)
    n = ||V|| by rows          weight_norm   (D3, D4), held constant in the backward pass (D5)
    c = m / n                  ratio         (D7)
    y = c * (x V') + b         forward       (D8), with x V' as x W' + s (x A') B'; with dropout D9
"""

import math
from typing import Final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from ref.types import Adapter, InputError, NormGradient

GUARD_BITS: Final = 10
"""How many bits the factored norm may lose to cancellation before its row is computed directly (D13)."""


def scaling(alpha: float, rank: int, *, rank_stabilized: bool = False) -> float:
    """D1: the factor s of the product B A.

        s = alpha / r        or, rank-stabilised (Kalajdzievski 2023),        s = alpha / sqrt(r)

    Raises:
        InputError: where `rank` is below 1, or `alpha` is zero, negative or not finite.
    """
    if rank < 1:
        raise InputError(f"rank {rank} is below 1", hint="give the inner dimension of B A, 1 or more")
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"alpha {alpha} is not a positive finite number", hint="alpha = rank gives a scaling of 1")

    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def direction(
    W_OI: Float[Array, "O I"], lora_A: Float[Array, "R I"], lora_B: Float[Array, "O R"], *, scaling: float
) -> Float[Array, "O I"]:
    """D2: the weight whose rows are normalised, `V = W + s B A`.

    A `W_OI` narrower than the adapter (a bf16 base, D11) is widened to the adapter's dtype first.
    """
    W_OI = _at_least(W_OI, lora_B.dtype)

    return W_OI + scaling * (lora_B @ lora_A)


def weight_norm(V_OK: Float[Array, "O *K"]) -> Float[Array, " O"]:
    """D3, D4: the 2-norm of each output row, over every axis but the first, in float32 or wider.

        n_i = p_i sqrt(sum_k (V_ik / p_i)^2),        p_i the power of two next to max_k |V_ik|

    Dividing by a power of two is exact: nothing is rounded that the plain norm would not round, while the squares
    neither overflow nor underflow, so that n_i is 0 only if every V_ik is. (XLA on CPU reads subnormal numbers as 0.)
    It is differentiable, with gradient 0 at a row of zeros; the layer holds it constant all the same (D5).
    """
    V_OK = V_OK.reshape(V_OK.shape[0], math.prod(V_OK.shape[1:]))
    V_OK = _at_least(V_OK, jnp.dtype(jnp.float32))

    power_O = power_of_two(jnp.max(jnp.abs(V_OK), axis=1, initial=0))
    squares_O = jnp.sum(jnp.square(V_OK / power_O[:, None]), axis=1)

    return scaled_root(squares_O, power_O)


def scaled_root(squares_O: Float[Array, " O"], power_O: Float[Array, " O"]) -> Float[Array, " O"]:
    """D4: the norm from the sum of squares of a row that was divided by a power of two; gradient 0 where it is 0."""
    zero_O = squares_O == 0
    n_O = jnp.where(zero_O, 0, power_O * jnp.sqrt(jnp.where(zero_O, 1, squares_O)))

    return _as_stored(n_O)


def power_of_two(largest_O: Float[Array, " O"]) -> Float[Array, " O"]:
    """D4: the power of two next to each number, within the range where its reciprocal is normal too; 1 for a zero."""
    limits = jnp.finfo(largest_O.dtype)
    bounded_O = jnp.clip(largest_O, 2 * limits.tiny, 1 / (2 * limits.tiny))
    power_O = lax.reduce_precision(bounded_O, exponent_bits=limits.nexp, mantissa_bits=0)

    return lax.stop_gradient(jnp.where(largest_O == 0, 1, power_O))


def zero_rows(V_OK: Float[Array, "O *K"]) -> Bool[Array, " O"]:
    """D7: which output rows hold nothing but zeros, and therefore never train; count them beforehand."""
    return jnp.all(V_OK.reshape(V_OK.shape[0], math.prod(V_OK.shape[1:])) == 0, axis=1)


def factored_weight_norm(
    W_OI: Float[Array, "O I"], lora_A: Float[Array, "R I"], lora_B: Float[Array, "O R"], *, scaling: float
) -> Float[Array, " O"]:
    """D13: the norm of the direction without forming it; an algorithm for D3, not a definition.

        n_i^2 = ||W_i||^2 + 2 s <(W A')_i, B_i> + s^2 <(B (A A'))_i, B_i>

    The absolute terms of the three sums are together at most `size_i^2`, by Cauchy and Schwarz, where
    `size_i = ||W_i|| + s sum_r |B_ir| ||A_r||`. Rows that `guarded_rows` names are computed by `weight_norm` instead.
    """
    W_OI = _at_least(W_OI, lora_B.dtype)

    base_O = jnp.sum(W_OI * W_OI, axis=1)
    cross_O = jnp.sum((W_OI @ lora_A.T) * lora_B, axis=1)
    delta_O = jnp.sum((lora_B @ (lora_A @ lora_A.T)) * lora_B, axis=1)
    squares_O = base_O + 2 * scaling * cross_O + scaling**2 * delta_O

    norm_R = weight_norm(lora_A)
    size_O = weight_norm(W_OI) + scaling * (jnp.abs(lora_B) @ norm_R)
    guarded_O = guarded_rows(squares_O, size_O, norm_R=norm_R, terms=W_OI.shape[1] + 2 * lora_A.shape[0])
    factored_O = jnp.sqrt(jnp.where(guarded_O, 1, squares_O))
    direct_O = weight_norm(direction(W_OI, lora_A, lora_B, scaling=scaling))

    return _as_stored(jnp.where(guarded_O, direct_O, factored_O))


def guarded_rows(
    squares_O: Float[Array, " O"], size_O: Float[Array, " O"], *, norm_R: Float[Array, " R"], terms: int
) -> Bool[Array, " O"]:
    """D13, D4: the rows whose factored square is not to be trusted.

        n_i^2 <= K u size_i^2,        K = max(2^-GUARD_BITS / u, 4 (terms + 8))

    Each of the three sums runs over at most `terms = in + 2 r` products in sequence and takes part in fewer than 8
    further roundings, so the computed square is off by at most `(terms + 8) u size_i^2` (to first order). The second
    argument of the maximum keeps an unguarded square positive: its error is then at most a third of it. The first
    limits the loss to `GUARD_BITS`: the relative error of an unguarded n is at most `2^GUARD_BITS (terms + 8) u / 2`.

    That count presumes that products neither overflow nor underflow. Rows are guarded, too, where the square is not
    finite, or where `size_i` or a row norm of A is so small that lost products could weigh more than u^2.
    """
    limits = jnp.finfo(squares_O.dtype)
    unit_roundoff = float(limits.eps) / 2
    share = max(2.0**-GUARD_BITS, 4 * (terms + 8) * unit_roundoff)
    smallest = math.sqrt(float(limits.tiny)) / unit_roundoff

    in_range_O = (size_O > smallest) & jnp.all((norm_R > smallest) | (norm_R == 0)) & jnp.isfinite(squares_O)
    relative_O = squares_O / jnp.where(in_range_O, size_O, 1) / jnp.where(in_range_O, size_O, 1)

    return ~(in_range_O & (relative_O > share))


def initial_magnitude(
    W_OI: Float[Array, "O I"], lora_A: Float[Array, "R I"], lora_B: Float[Array, "O R"], *, scaling: float
) -> Float[Array, " O"]:
    """D6, D11: the magnitude at start, `m = ||W + s B0 A0||` by rows, in float32 or wider.

    `W_OI` is the weight that the forward multiplies by: under QDoRA the dequantised and cast one.
    """
    V_OI = direction(W_OI, lora_A, lora_B, scaling=scaling)

    return weight_norm(V_OI)


def ratio(m_O: Float[Array, " O"], n_O: Float[Array, " O"]) -> Float[Array, " O"]:
    """D7: `c = m / n` by rows, and 0 where n is 0, with neither value nor gradient ever 0/0.

    With the magnitude that D6 gives, and B still 0, every other ratio is exactly 1 (D12).
    The inner `where` keeps the division defined, the outer one discards its result: the gradient of a discarded finite
    number is 0, that of a discarded NaN would be NaN.
    """
    zero_O = n_O == 0
    safe_n_O = jnp.where(zero_O, 1, n_O)

    return jnp.where(zero_O, 0, m_O / safe_n_O)


def forward(
    x_TI: Float[Array, "T I"],
    W_OI: Float[Array, "O I"],
    adapter: Adapter,
    *,
    scaling: float,
    bias_O: Float[Array, " O"] | None = None,
    mask_TI: Float[Array, "T I"] | None = None,
    norm_gradient: NormGradient = "constant",
) -> Float[Array, "T O"]:
    """D5, D8, D9: the layer's output, whose derivative is the layer's gradient.

        y = c * (x W' + s (x A') B') + b,        c = m / stop_gradient(n)

    `x_TI` and `W_OI` are in the compute dtype, which y has too. The adapter may be wider (D11): A and B are cast for
    the products, never for the norm, and m, n, c stay as wide as they are. `norm_gradient="full"` leaves out the
    stop_gradient: the same output, other gradients. `mask_TI` is dropout's (D9), see `dropout_mask`.

    Raises:
        InputError: where `norm_gradient` is neither "constant" nor "full".
    """
    if norm_gradient not in ("constant", "full"):
        raise InputError(f"norm_gradient {norm_gradient!r} is unknown", hint="give 'constant' (D5) or 'full'")

    V_OI = direction(W_OI, adapter.lora_A, adapter.lora_B, scaling=scaling)
    n_O = checkpoint_name(weight_norm(V_OI), "n")
    n_O = lax.stop_gradient(n_O) if norm_gradient == "constant" else n_O
    c_O = ratio(adapter.magnitude, n_O)

    return forward_with_ratio(x_TI, W_OI, adapter, c_O=c_O, scaling=scaling, bias_O=bias_O, mask_TI=mask_TI)


def forward_with_ratio(
    x_TI: Float[Array, "T I"],
    W_OI: Float[Array, "O I"],
    adapter: Adapter,
    *,
    c_O: Float[Array, " O"],
    scaling: float,
    bias_O: Float[Array, " O"] | None = None,
    mask_TI: Float[Array, "T I"] | None = None,
) -> Float[Array, "T O"]:
    """D8, D9: the output for a given ratio; V is not formed, as nobody forms it.

        y = c * (x W' + s (x A') B') + b,        or with dropout, u = mask * x,
        y = x W' + (c - 1) * (u W') + c * (s (u A') B') + b

    The products are in the compute dtype, that of `x_TI`; the ratio and the bias are applied in the dtype of `c_O`.
    """
    A_RI = adapter.lora_A.astype(x_TI.dtype)
    B_OR = adapter.lora_B.astype(x_TI.dtype)
    base_TO = x_TI @ W_OI.T

    if mask_TI is None:
        y0_TO = checkpoint_name(base_TO + scaling * ((x_TI @ A_RI.T) @ B_OR.T), "y0")
        y_TO = c_O[None, :] * y0_TO.astype(c_O.dtype)
    else:
        u_TI = mask_TI.astype(x_TI.dtype) * x_TI
        kept_TO, delta_TO = u_TI @ W_OI.T, scaling * ((u_TI @ A_RI.T) @ B_OR.T)
        base_TO, kept_TO, delta_TO = (product.astype(c_O.dtype) for product in (base_TO, kept_TO, delta_TO))
        y_TO = base_TO + (c_O - 1)[None, :] * kept_TO + c_O[None, :] * delta_TO
    y_TO = y_TO if bias_O is None else y_TO + bias_O.astype(c_O.dtype)[None, :]

    return y_TO.astype(x_TI.dtype)


def dropout_mask(key: Array, shape: tuple[int, ...], *, rate: float, dtype: DTypeLike) -> Float[Array, "..."]:
    """D9: what dropout multiplies its input by: 0 with probability `rate`, otherwise `1 / (1 - rate)`.

    Raises:
        InputError: where `rate` is below 0, or 1 and above.
    """
    if not 0 <= rate < 1:
        raise InputError(f"rate {rate} is no probability below 1", hint="0 keeps everything")

    return jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate)


def merge(W_OI: Float[Array, "O I"], adapter: Adapter, *, scaling: float) -> Float[Array, "O I"]:
    """D10: the plain weight that does what the layer does, `W_merged = c * V` by rows.

    Its dtype is the adapter's. Merging into a four-bit base takes and gives dequantised weights; coding the result
    again is a separate step that loses precision. Arithmetic does not undo a merge: keep the bits of `W_OI` aside.
    """
    V_OI = direction(W_OI, adapter.lora_A, adapter.lora_B, scaling=scaling)
    n_O = weight_norm(V_OI)
    c_O = ratio(adapter.magnitude, n_O)

    return c_O[:, None] * V_OI


def _at_least(W_OK: Float[Array, "O *K"], dtype: jnp.dtype) -> Float[Array, "O *K"]:
    """The same numbers in the wider of the two dtypes."""
    return W_OK if jnp.finfo(W_OK.dtype).bits >= jnp.finfo(dtype).bits else W_OK.astype(dtype)


def _as_stored(n_O: Float[Array, " O"]) -> Float[Array, " O"]:
    """The same number, in a form that XLA does not see through: it would turn m / sqrt(q) into m * rsqrt(q) (D12).

    On CPU the choice between zero and root in `weight_norm` hides the root as well; other compilers promise nothing.
    """
    limits = jnp.finfo(n_O.dtype)

    return lax.reduce_precision(n_O, exponent_bits=limits.nexp, mantissa_bits=limits.nmant)
