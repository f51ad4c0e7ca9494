"""Every kind of layer as one rule: its weight is rows of numbers, one row an output feature. Clauses D2, D3, D9, G1.

Axes: T places of the output (tokens, or batch x positions), G groups, O out, R rank, K the numbers of one row; N batch,
I in, V vocabulary, D embedding features. A layer of any kind is a linear layer of its unfolded input, group by group:

    P_GTK = unfold(x)        y_GTO = forward(P_GTK, W_GOK, adapter_G)        gradients: fold(closed_form(P_GTK, ...))

    kind          row of W                            unfolded input
    linear        W_i                                 x
    fan_in_fan_out  column of the stored W_IO         x
    embedding     column of the stored W_VD           a one-hot row for each token
    convolution   W_i, of I / G channels and kernel   the patch of x under the kernel

The forward functions compute with the layer's own operation and never unfold; the closed forms unfold, and so are a
second statement that shares no operation with the first.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ref import dora, gradients
from ref.types import Adapter, InputError, LayerGradients, NormGradient


@dataclass(frozen=True)
class Window:
    """Where a convolution's kernel goes, an entry for each spatial axis; the words are torch's."""

    stride: tuple[int, ...]
    """By how much the kernel moves."""

    padding: tuple[int, ...]
    """How many zeros stand at each end."""

    dilation: tuple[int, ...]
    """How far apart the kernel's numbers lie."""

    groups: int = field(default=1)
    """How many independent convolutions there are: each reads and writes an equal share of the channels."""


def stored_transposed(W_IO: Float[Array, "I O"]) -> Float[Array, "O I"]:
    """D3: the weight of a fan_in_fan_out layer (GPT-2's Conv1D) in the orientation that every function here takes."""
    return W_IO.T


def direction(
    W_OK: Float[Array, "O *K"],
    lora_A: Float[Array, "S *K"],
    lora_B: Float[Array, "P R *ones"],
    *,
    scaling: float,
    groups: int = 1,
) -> Float[Array, "O *K"]:
    """D2, D3: `V = W + s B A`, in each group by itself, in the shape of W.

    A holds the R rows of each group in turn (S = groups R), B the rows of the output with their own group's R numbers.

    Raises:
        InputError: where the shapes of the weight and the factors do not fit.
    """
    W_GOK, adapter = _by_groups(W_OK, Adapter(lora_A, lora_B, jnp.zeros(W_OK.shape[0], lora_B.dtype)), groups)
    V_GOK = jax.vmap(partial(dora.direction, scaling=scaling))(W_GOK, adapter.lora_A, adapter.lora_B)

    return V_GOK.reshape(W_OK.shape)


def embedding(
    ids_T: Int[Array, " T"],
    W_VD: Float[Array, "V D"],
    adapter: Adapter,
    *,
    scaling: float,
    padding_idx: int | None = None,
    norm_gradient: NormGradient = "constant",
) -> Float[Array, "T D"]:
    """D3: a row for each token, `c * (W[id] + s (A'[id]) B')`, one magnitude for each embedding feature.

    `lora_A` is `(R, V)`, `lora_B` `(D, R)`; the norm is over the vocabulary. The column of A that belongs to
    `padding_idx` gets no gradient, as in torch; B and the magnitude do, from every token.
    """
    A_RV, B_DR = adapter.lora_A, adapter.lora_B
    c_D = _ratio(direction(W_VD.T, A_RV, B_DR, scaling=scaling), adapter.magnitude, norm_gradient)
    a_TR = A_RV.T[ids_T]
    a_TR = a_TR if padding_idx is None else jnp.where((ids_T == padding_idx)[:, None], lax.stop_gradient(a_TR), a_TR)

    return c_D[None, :] * (W_VD[ids_T] + scaling * (a_TR @ B_DR.T))


def embedding_closed_form(
    ids_T: Int[Array, " T"],
    W_VD: Float[Array, "V D"],
    adapter: Adapter,
    *,
    G_TD: Float[Array, "T D"],
    scaling: float,
    padding_idx: int | None = None,
    norm_gradient: NormGradient = "constant",
) -> Adapter:
    """G1: the derivatives of `sum(G * embedding(...))` by A, B and m: the linear layer's, of one-hot rows."""
    onehot_TV = jax.nn.one_hot(ids_T, W_VD.shape[0], dtype=W_VD.dtype)
    options = {"scaling": scaling, "norm_gradient": norm_gradient}
    found = gradients.closed_form(onehot_TV, W_VD.T, adapter, G_TO=G_TD, **options)
    if padding_idx is None:
        return Adapter(found.lora_A, found.lora_B, found.magnitude)

    c_D = _ratio(direction(W_VD.T, adapter.lora_A, adapter.lora_B, scaling=scaling), adapter.magnitude, "constant")
    padded_D = jnp.sum(jnp.where((ids_T == padding_idx)[:, None], G_TD, 0), axis=0)
    withheld_R = scaling * ((c_D * padded_D) @ adapter.lora_B)

    return Adapter(found.lora_A.at[:, padding_idx].add(-withheld_R), found.lora_B, found.magnitude)


def convolution(
    x_NI: Float[Array, "N I *space"],
    W_OK: Float[Array, "O *K"],
    adapter: Adapter,
    *,
    window: Window,
    scaling: float,
    bias_O: Float[Array, " O"] | None = None,
    mask_NI: Float[Array, "N I *space"] | None = None,
    norm_gradient: NormGradient = "constant",
) -> Float[Array, "N O *places"]:
    """D3, D8, D9: a convolution in one, two or three dimensions, with torch's axes.

    With `*` the convolution, in groups: `y = c (x * W + s ((x * A) * B)) + b`, and D9 with a mask. `lora_A`
    is `(groups R, I / groups, kernel)`; `lora_B`, `(O, R, 1 ...)`, has a kernel of ones, and a group reads its own R.

    Raises:
        InputError: where the shapes of input, weight, factors and window do not fit.
    """
    _check_window(x_NI, W_OK, window)
    _check_factors(W_OK, adapter, window.groups)
    V_OK = direction(W_OK, adapter.lora_A, adapter.lora_B, scaling=scaling, groups=window.groups)
    c_1O = _ratio(V_OK, adapter.magnitude, norm_gradient).reshape(1, -1, *(1,) * (x_NI.ndim - 2))
    u_NI = x_NI if mask_NI is None else mask_NI * x_NI
    once = Window(*((one,) * (x_NI.ndim - 2) for one in (1, 0, 1)), groups=window.groups)

    base_NO = _convolve(x_NI, W_OK, window)
    delta_NO = scaling * _convolve(_convolve(u_NI, adapter.lora_A, window), adapter.lora_B, once)
    kept_NO = base_NO if mask_NI is None else _convolve(u_NI, W_OK, window)
    y_NO = c_1O * (kept_NO + delta_NO) if mask_NI is None else base_NO + (c_1O - 1) * kept_NO + c_1O * delta_NO

    return y_NO if bias_O is None else y_NO + bias_O.reshape(1, -1, *(1,) * (x_NI.ndim - 2))


def convolution_closed_form(
    x_NI: Float[Array, "N I *space"],
    W_OK: Float[Array, "O *K"],
    adapter: Adapter,
    *,
    G_NO: Float[Array, "N O *places"],
    window: Window,
    scaling: float,
    mask_NI: Float[Array, "N I *space"] | None = None,
    norm_gradient: NormGradient = "constant",
) -> LayerGradients:
    """G1, D9: the derivatives of `sum(G * convolution(...))`: the linear layer's, of patches, group by group.

    The gradient of x is the sum over the patches that a number stands in, which is the transpose of `unfold`.
    """
    kernel = W_OK.shape[2:]
    apart = partial(unfold, kernel=kernel, window=window)
    W_GOK, adapters = _by_groups(W_OK, adapter, window.groups)
    mask_GTK = apart(jnp.ones_like(x_NI) if mask_NI is None else mask_NI)
    G_GTO = jnp.moveaxis(G_NO, 1, -1).reshape(-1, window.groups, W_GOK.shape[1]).swapaxes(0, 1)

    def closed(P_TK: Array, W_OK: Array, adapter: Adapter, mask_TK: Array, G_TO: Array) -> LayerGradients:
        masked = None if mask_NI is None else mask_TK
        options = {"scaling": scaling, "mask_TI": masked, "norm_gradient": norm_gradient}
        return gradients.closed_form(P_TK, W_OK, adapter, G_TO=G_TO, **options)

    found = jax.vmap(closed)(apart(x_NI), W_GOK, adapters, mask_GTK, G_GTO)
    (dx_NI,) = jax.linear_transpose(apart, x_NI)(found.x)

    return LayerGradients(
        lora_A=found.lora_A.reshape(adapter.lora_A.shape),
        lora_B=found.lora_B.reshape(adapter.lora_B.shape),
        magnitude=found.magnitude.reshape(-1),
        x=dx_NI,
    )


def unfold(x_NI: Float[Array, "N I *space"], *, kernel: tuple[int, ...], window: Window) -> Float[Array, "G T K"]:
    """D3: the patch under the kernel at each place, as the row of numbers that a row of the weight multiplies."""
    patches = lax.conv_general_dilated_patches(
        x_NI, kernel, window.stride, _both_ends(window), rhs_dilation=window.dilation
    )
    places_NTK = jnp.moveaxis(patches, 1, -1).reshape(-1, window.groups, patches.shape[1] // window.groups)

    return places_NTK.swapaxes(0, 1)


def initial_factors(
    key: Array, weight_shape: tuple[int, ...], *, rank: int, groups: int = 1, dtype: DTypeLike = "float32"
) -> tuple[Float[Array, "S *K"], Float[Array, "O R *ones"]]:
    """D12: the factors at start as PEFT draws them for a linear layer or a convolution; B is zero.

    A is uniform within `1 / sqrt(K)`, K the numbers of a row: Kaiming's bound with a = sqrt(5) (arXiv:1502.01852, as
    torch's own layers use it). The distribution is PEFT's; the numbers, from another generator, are not.
    """
    limit = 1 / math.sqrt(math.prod(weight_shape[1:]))
    lora_A = jax.random.uniform(key, (groups * rank, *weight_shape[1:]), dtype, -limit, limit)

    return lora_A, jnp.zeros((weight_shape[0], rank, *(1,) * (len(weight_shape) - 2)), dtype)


def initial_embedding_factors(
    key: Array, weight_shape: tuple[int, int], *, rank: int, dtype: DTypeLike = "float32"
) -> tuple[Float[Array, "R V"], Float[Array, "D R"]]:
    """D12: the factors of an embedding `(V, D)` at start, as PEFT has them: A is zero, B standard normal."""
    return jnp.zeros((rank, weight_shape[0]), dtype), jax.random.normal(key, (weight_shape[1], rank), dtype)


def _ratio(V_OK: Array, m_O: Array, norm_gradient: NormGradient) -> Float[Array, " O"]:
    """D3, D5, D7: m / n, with n held constant unless asked for."""
    if norm_gradient not in ("constant", "full"):
        raise InputError(f"norm_gradient {norm_gradient!r} is unknown", hint="give 'constant' (D5) or 'full'")
    n_O = dora.weight_norm(V_OK)

    return dora.ratio(m_O, lax.stop_gradient(n_O) if norm_gradient == "constant" else n_O)


def _by_groups(W_OK: Array, adapter: Adapter, groups: int) -> tuple[Float[Array, "G O K"], Adapter]:
    """The weight and the adapter of each group, as matrices, along a new first axis."""
    _check_factors(W_OK, adapter, groups)
    out, rank = adapter.lora_B.shape[:2]

    return W_OK.reshape(groups, out // groups, -1), Adapter(
        lora_A=adapter.lora_A.reshape(groups, rank, -1),
        lora_B=adapter.lora_B.reshape(groups, out // groups, rank),
        magnitude=adapter.magnitude.reshape(groups, out // groups),
    )


def _check_factors(W_OK: Array, adapter: Adapter, groups: int) -> None:
    out, rank = W_OK.shape[0], adapter.lora_B.shape[1]
    wanted = {
        "lora_A": (groups * rank, *W_OK.shape[1:]),
        "lora_B": (out, rank, *(1,) * (W_OK.ndim - 2)),
        "magnitude": (out,),
    }
    came = {name: getattr(adapter, name).shape for name in wanted}
    faults = [f"{name} has shape {came[name]}, wanted {wanted[name]}" for name in wanted if came[name] != wanted[name]]
    if out % groups:
        faults.append(f"{out} output channels do not divide into {groups} groups")
    if faults:
        raise InputError("; ".join(faults), hint="lora_A holds the rank's rows of each group in turn")


def _convolve(x_NI: Array, W_OK: Array, window: Window) -> Array:
    return lax.conv_general_dilated(
        x_NI,
        W_OK,
        window.stride,
        _both_ends(window),
        rhs_dilation=window.dilation,
        feature_group_count=window.groups,
    )


def _both_ends(window: Window) -> list[tuple[int, int]]:
    return [(zeros, zeros) for zeros in window.padding]


def _check_window(x_NI: Array, W_OK: Array, window: Window) -> None:
    spatial = W_OK.ndim - 2
    if x_NI.ndim != W_OK.ndim or {len(window.stride), len(window.padding), len(window.dilation)} != {spatial}:
        raise InputError(
            f"x has {x_NI.ndim - 2} spatial axes, the weight {spatial}, the window {window}",
            hint="give one number each",
        )
    if x_NI.shape[1] != window.groups * W_OK.shape[1]:
        raise InputError(
            f"x has {x_NI.shape[1]} channels, the weight reads {window.groups} x {W_OK.shape[1]}",
            hint="channels are axis 1, and the weight has those of one group",
        )
