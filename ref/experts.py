"""A stack of linear layers, the experts, of which each token visits a few. Clause D16.

Axes: E experts, S visits (a token that visits k experts stands here k times), I in, O out, R rank.

The router's weights, and the sum of a token's visits, belong to the model: neither is a part of the layer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ref import dora, gradients
from ref.types import Adapter, LayerGradients, NormGradient


def experts(
    x_SI: Float[Array, "S I"],
    expert_S: Int[Array, " S"],
    W_EOI: Float[Array, "E O I"],
    adapter: Adapter,
    *,
    scaling: float,
    mask_SI: Float[Array, "S I"] | None = None,
    norm_gradient: NormGradient = "constant",
) -> Float[Array, "S O"]:
    """D16: every visit by the DoRA layer of its expert; `lora_A` is `(E, R, I)`, `lora_B` `(E, O, R)`, m `(E, O)`.

    Each expert is a layer by itself, with norms, ratio and gradients of its own. One that nobody visits has gradients
    of exactly 0: here every expert is applied to every visit, and the results of all but one are left out.
    """
    layer = partial(dora.forward, scaling=scaling, mask_TI=mask_SI, norm_gradient=norm_gradient)
    y_ESO = jax.vmap(layer, in_axes=(None, 0, 0))(x_SI, W_EOI, adapter)

    return y_ESO[expert_S, jnp.arange(x_SI.shape[0])]


def experts_closed_form(
    x_SI: Float[Array, "S I"],
    expert_S: Int[Array, " S"],
    W_EOI: Float[Array, "E O I"],
    adapter: Adapter,
    *,
    G_SO: Float[Array, "S O"],
    scaling: float,
) -> LayerGradients:
    """G1, D16: the gradients of `sum(G * experts(...))`, an expert's from the visits to it, and those of x."""
    visited_ES = expert_S[None, :] == jnp.arange(W_EOI.shape[0])[:, None]
    G_ESO = jnp.where(visited_ES[:, :, None], G_SO[None], 0)

    def own(W_OI: Array, adapter: Adapter, G_TO: Array) -> LayerGradients:
        return gradients.closed_form(x_SI, W_OI, adapter, G_TO=G_TO, scaling=scaling)

    each = jax.vmap(own)(W_EOI, adapter, G_ESO)

    return LayerGradients(lora_A=each.lora_A, lora_B=each.lora_B, magnitude=each.magnitude, x=each.x.sum(axis=0))


def merge_experts(W_EOI: Float[Array, "E O I"], adapter: Adapter, *, scaling: float) -> Float[Array, "E O I"]:
    """D10, D16: every expert merged by itself."""
    return jax.vmap(partial(dora.merge, scaling=scaling))(W_EOI, adapter)
