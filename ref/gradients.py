"""The gradients of the DoRA layer in closed form: a second statement of clause D5 that no autodiff takes part in.

Axes: T tokens, I in, O out, R rank (the legend is in `types`). Clauses G1 (autodiff equals the closed form) and G2
(both equal differences of the surrogate, in which the norm is an input). With y0 = x V' and H = G * c:

    dm = sum_t(G * y0) / n        dB = s H' (x A')        dA = s (H B)' x        dx = H V

With dropout (D9), u = mask * x takes the place of x, in y0 as well, and dx = G W + mask * (H V - G W).
"""

from collections.abc import Callable
from typing import Final, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Inexact

from ref.dora import direction, ratio, weight_norm
from ref.types import Adapter, InputError, LayerGradients, NormGradient

Tree = TypeVar("Tree")

STEP: Final = 2.0**-200
"""The complex step: its square vanishes beside 1 in float64, and the step itself is far from underflow."""


def closed_form(
    x_TI: Float[Array, "T I"],
    W_OI: Float[Array, "O I"],
    adapter: Adapter,
    *,
    G_TO: Float[Array, "T O"],
    scaling: float,
    mask_TI: Float[Array, "T I"] | None = None,
    norm_gradient: NormGradient = "constant",
) -> LayerGradients:
    """G1, D9: the derivatives of `sum(G * forward(x, W, adapter))`, all arrays in one dtype.

    Rows with n = 0 give dm = dB = 0 and add nothing to dA and dx (D7). A bias changes none of them (D8).
    Formulas: Liu et al. 2024 (DoRA), section 4.3, for a row-wise norm; with "full", section 4.2.

    Raises:
        InputError: where `norm_gradient` is neither "constant" nor "full".
    """
    if norm_gradient not in ("constant", "full"):
        raise InputError(f"norm_gradient {norm_gradient!r} is unknown", hint="give 'constant' (D5) or 'full'")

    A_RI, B_OR = adapter.lora_A, adapter.lora_B
    V_OI = direction(W_OI, A_RI, B_OR, scaling=scaling)
    n_O = weight_norm(V_OI)
    c_O = ratio(adapter.magnitude, n_O)
    u_TI = x_TI if mask_TI is None else mask_TI * x_TI
    y0_TO = u_TI @ W_OI.T + scaling * ((u_TI @ A_RI.T) @ B_OR.T)
    H_TO = G_TO * c_O[None, :]

    dm_O = ratio(jnp.sum(G_TO * y0_TO, axis=0), n_O)
    dB_OR = scaling * (H_TO.T @ (u_TI @ A_RI.T))
    dA_RI = scaling * ((H_TO @ B_OR).T @ u_TI)
    dx_TI = H_TO @ V_OI
    dx_TI = dx_TI if mask_TI is None else G_TO @ W_OI + mask_TI * (dx_TI - G_TO @ W_OI)

    if norm_gradient == "full":
        dV_OI = norm_path(V_OI, n_O=n_O, c_O=c_O, dm_O=dm_O)
        dB_OR = dB_OR + scaling * (dV_OI @ A_RI.T)
        dA_RI = dA_RI + scaling * (B_OR.T @ dV_OI)

    return LayerGradients(lora_A=dA_RI, lora_B=dB_OR, magnitude=dm_O, x=dx_TI)


def norm_path(
    V_OI: Float[Array, "O I"], *, n_O: Float[Array, " O"], c_O: Float[Array, " O"], dm_O: Float[Array, " O"]
) -> Float[Array, "O I"]:
    """What D5 leaves out: the derivative that reaches the direction through the norm, under `norm_gradient="full"`.

    dV_i = -(m_i / n_i^3) sum_t(G_ti y0_ti) V_i = -c_i dm_i V_i / n_i
    """
    return -ratio(c_O * dm_O, n_O)[:, None] * V_OI


def surrogate(
    x_TI: Inexact[Array, "T I"],
    W_OI: Inexact[Array, "O I"],
    adapter: Adapter,
    *,
    n_O: Float[Array, " O"],
    scaling: float,
    mask_TI: Inexact[Array, "T I"] | None = None,
) -> Inexact[Array, "T O"]:
    """G2, D9: the layer with its norm held as an input, so that differences of values give the gradients of D5.

        y = (m / n) * (u W' + s (u A') B') + (x - u) W',        u = mask * x, or x without dropout

    Differences of the layer itself would contradict D5: they see the norm move. All arrays but the norm are in one
    dtype, real or complex; where n is 0 the output is 0 (D7).
    """
    A_RI, B_OR, m_O = adapter.lora_A, adapter.lora_B, adapter.magnitude

    c_O = jnp.where(n_O == 0, 0, m_O / jnp.where(n_O == 0, 1, n_O).astype(m_O.dtype))
    u_TI = x_TI if mask_TI is None else mask_TI * x_TI
    y_TO = c_O[None, :] * (u_TI @ W_OI.T + scaling * ((u_TI @ A_RI.T) @ B_OR.T))

    return y_TO if mask_TI is None else y_TO + (x_TI - u_TI) @ W_OI.T


def complex_step(function: Callable[[Tree], Array], at: Tree, along: Tree) -> Float[Array, ""]:
    """G2: the derivative of a scalar analytic function of float64 arrays along a direction, with no subtraction.

        f'(z)[d] = Im f(z + i h d) / h,        off by O(h^2), far below rounding

    Source: Squire and Trapp, SIAM Review 40 (1998). It shares no rule with autodiff: only values are computed.
    """
    shifted = jax.tree.map(lambda value, step: jax.lax.complex(value, STEP * step), at, along)

    return jnp.imag(function(shifted)) / STEP
