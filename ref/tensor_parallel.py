"""Tensor parallelism: a layer whose output rows, or whose input features, are cut over a mesh's axis `tensor`.

Axes: T tokens, I in, O out, R rank of the adapter; small letters (o, i) are a tensor rank's part. Clause S10. A layer's
parameters on tensor rank p, and its forward; each collective of the backward is written out beside its own:

    column    W[p] (o, I)   A (R, I)      B[p] (o, R)   m[p], b[p] (o)     y[p] = c[p] * (x V[p]') + b[p]
    row       W[p] (O, i)   A[p] (R, i)   B (O, R)      m, b (O)           y = c * sum_p (x[p] V[p]') + b

with n[p] local in the first, and n^2 = sum_p n[p]^2 in the second.
"""

from dataclasses import replace
from typing import Final, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ref.dora import direction, forward_with_ratio, power_of_two, ratio, scaled_root, weight_norm
from ref.types import Layer

TENSOR: Final = "tensor"
"""S10: the axis along which a layer's features are cut."""

Cut: TypeAlias = Literal["column", "row"]
"""S10: which features of a layer the tensor axis cuts: the output ones, or the input ones."""

# Pairs of collectives: the one of the forward pass, and the one that it brings about in the backward pass.


@jax.custom_vjp
def use_on_all(whole: Float[Array, "*K"]) -> Float[Array, "*K"]:
    """S10: hand a whole value to every tensor rank's part; the parts of its gradient are summed, never averaged.

    forward   nothing
    backward  all_reduce (sum) over `tensor`
    """
    return whole


use_on_all.defvjp(lambda whole: (whole, None), lambda _, cotangent: (lax.psum(cotangent, TENSOR),))


@jax.custom_vjp
def sum_of_all(part: Float[Array, "*K"]) -> Float[Array, "*K"]:
    """S10: the sum of all tensor ranks' parts; each part's gradient is the sum's own.

    forward   all_reduce (sum) over `tensor`
    backward  nothing
    """
    return lax.psum(part, TENSOR)


sum_of_all.defvjp(lambda part: (lax.psum(part, TENSOR), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def own_features(x_TI: Float[Array, "T I"]) -> Float[Array, "T i"]:
    """S10: this tensor rank's features of a whole input.

    forward   a slice
    backward  all_gather over `tensor`
    """
    width = x_TI.shape[1] // lax.axis_size(TENSOR)

    return lax.dynamic_slice_in_dim(x_TI, lax.axis_index(TENSOR) * width, width, axis=1)


own_features.defvjp(
    lambda x_TI: (own_features(x_TI), None),
    lambda _, cotangent: (lax.all_gather(cotangent, TENSOR, axis=1, tiled=True),),
)


@jax.custom_vjp
def all_features(x_Ti: Float[Array, "T i"]) -> Float[Array, "T I"]:
    """S10: the whole input from all tensor ranks' features.

    forward   all_gather over `tensor`
    backward  a slice
    """
    return lax.all_gather(x_Ti, TENSOR, axis=1, tiled=True)


all_features.defvjp(lambda x_Ti: (all_features(x_Ti), None), lambda _, cotangent: (own_features(cotangent),))


# One layer on one rank.


def column_parallel(x_TI: Float[Array, "T I"], held: Layer) -> Float[Array, "T o"]:
    """S10: this tensor rank's output features, from whole inputs; the norm is local, no collective in the forward.

    dA and dx are sums over the tensor ranks of what each one's rows give.
    """
    x_TI = use_on_all(x_TI)
    adapter = replace(held.adapter, lora_A=use_on_all(held.adapter.lora_A))
    V_oI = direction(held.weight, adapter.lora_A, adapter.lora_B, scaling=held.scaling)
    c_o = ratio(adapter.magnitude, lax.stop_gradient(weight_norm(V_oI)))

    return forward_with_ratio(x_TI, held.weight, adapter, c_O=c_o, scaling=held.scaling, bias_O=held.bias)


def row_parallel(x_Ti: Float[Array, "T i"], held: Layer) -> Float[Array, "T O"]:
    """S10: whole outputs from this tensor rank's input features: y0 and n^2 are summed before anything else.

        y0 = sum_p (x[p] V[p]'),        n^2 = sum_p n[p]^2,        y = (m / n) * y0 + b

    so that dm, which holds y0, sees the whole of it. dB is the sum of what each tensor rank's features give.
    """
    adapter = replace(held.adapter, lora_B=use_on_all(held.adapter.lora_B))
    n_O = lax.stop_gradient(norm_of_cut_rows(held))

    part_TO = forward_with_ratio(x_Ti, held.weight, adapter, c_O=jnp.ones_like(n_O), scaling=held.scaling)
    y_TO = ratio(adapter.magnitude, n_O)[None, :] * sum_of_all(part_TO.astype(n_O.dtype))
    y_TO = y_TO if held.bias is None else y_TO + held.bias.astype(n_O.dtype)[None, :]

    return y_TO.astype(x_Ti.dtype)


def norm_of_cut_rows(held: Layer) -> Float[Array, " O"]:
    """S10, D4: the norm of rows that the tensor axis cuts: squares over one power of two are summed, then rooted."""
    V_Oi = direction(held.weight, held.adapter.lora_A, held.adapter.lora_B, scaling=held.scaling)
    V_Oi = lax.stop_gradient(V_Oi)
    power_O = power_of_two(lax.pmax(jnp.max(jnp.abs(V_Oi), axis=1, initial=0), TENSOR))
    squares_O = lax.psum(jnp.sum(jnp.square(V_Oi / power_O[:, None]), axis=1), TENSOR)

    return scaled_root(squares_O, power_O)
