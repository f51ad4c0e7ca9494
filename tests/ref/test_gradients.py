"""Clauses G1 and G2: autodiff, the closed form and differences agree in float64, to a bound derived from their sums."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from ref import dora, gradients
from ref.types import Adapter, LayerGradients, NormGradient

S = 0.5
TOKENS, IN, OUT, RANK = 7, 12, 9, 3
FIELDS = ["lora_A", "lora_B", "magnitude", "x"]
UNIT_ROUNDOFF = float(jnp.finfo(jnp.float64).eps) / 2


def normal(*shape: int, seed: int) -> Array:
    """Fixed Gaussian numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


X, W, G = normal(TOKENS, IN, seed=0), normal(OUT, IN, seed=1), normal(TOKENS, OUT, seed=2)
MASK = jnp.where(jnp.arange(TOKENS * IN).reshape(TOKENS, IN) % 3 == 0, 0, 1.5)  # drops a third
MASKS = pytest.mark.parametrize("mask_TI", [None, MASK], ids=["whole", "dropout"])
ADAPTER = Adapter(normal(RANK, IN, seed=3), normal(OUT, RANK, seed=4), 1 + jnp.abs(normal(OUT, seed=5)))
NORM = dora.weight_norm(dora.direction(W, ADAPTER.lora_A, ADAPTER.lora_B, scaling=S))


def autodiff(
    norm_gradient: NormGradient, *, W_OI: Array = W, adapter: Adapter = ADAPTER, mask_TI: Array | None = None
) -> LayerGradients:
    """What JAX makes of the specification's forward."""

    def loss(x_TI: Array, adapter: Adapter) -> Array:
        y_TO = dora.forward(x_TI, W_OI, adapter, scaling=S, mask_TI=mask_TI, norm_gradient=norm_gradient)
        return jnp.sum(G * y_TO)

    dx_TI, adapter_gradient = jax.grad(loss, argnums=(0, 1))(X, adapter)
    return LayerGradients(adapter_gradient.lora_A, adapter_gradient.lora_B, adapter_gradient.magnitude, dx_TI)


def sums_of_absolute_terms(norm_gradient: NormGradient) -> LayerGradients:
    """Every sum of the closed form with each term replaced by its absolute value: what rounding errors scale with."""
    x, w, g, a, b, c = (
        jnp.abs(array) for array in (X, W, G, ADAPTER.lora_A, ADAPTER.lora_B, dora.ratio(ADAPTER.magnitude, NORM))
    )
    v, h = w + S * b @ a, g * c[None, :]
    dm = jnp.sum(g * (x @ v.T), axis=0) / NORM
    dv = (c * dm / NORM)[:, None] * v if norm_gradient == "full" else jnp.zeros_like(v)
    return LayerGradients(S * (h @ b).T @ x + S * b.T @ dv, S * h.T @ (x @ a.T) + S * dv @ a.T, dm, h @ v)


def bound(field: str, norm_gradient: NormGradient) -> Array:
    """Chain u times the sum of absolute terms, for each of the two routes compared.

    The longest chain of sums is y0 (in, or in then r), its sum over tokens, V's sum over r, the sum over out or in
    behind it, the norm's derivative (in), and some 16 single products, quotients and additions.
    """
    chain = TOKENS + 3 * IN + 2 * RANK + OUT + 16
    return 2 * chain * UNIT_ROUNDOFF * getattr(sums_of_absolute_terms(norm_gradient), field)


def dropped_bound(field: str, norm_gradient: NormGradient) -> Array:
    """`bound` with dropout: each term holds the mask once, at most 1.5, and dx has G W three times more."""
    base = 2 * 3 * (OUT + 4) * UNIT_ROUNDOFF * (jnp.abs(G) @ jnp.abs(W)) if field == "x" else 0
    return 1.5 * (bound(field, norm_gradient) + base)


@pytest.mark.parametrize("norm_gradient", ["constant", "full"])
@pytest.mark.parametrize("field", FIELDS)
def test_g1_autodiff_equals_the_closed_form(field: str, norm_gradient: NormGradient) -> None:
    """The closed form is the derivative of the specification's forward, element by element."""
    closed = gradients.closed_form(X, W, ADAPTER, G_TO=G, scaling=S, norm_gradient=norm_gradient)

    error = jnp.abs(getattr(autodiff(norm_gradient), field) - getattr(closed, field))

    assert bool(jnp.all(error <= bound(field, norm_gradient)))


@pytest.mark.parametrize("norm_gradient", ["constant", "full"])
@pytest.mark.parametrize("field", FIELDS)
def test_d9_autodiff_equals_the_closed_form(field: str, norm_gradient: NormGradient) -> None:
    """With dropout, too, the closed form is the derivative of the specification's forward."""
    closed = gradients.closed_form(X, W, ADAPTER, G_TO=G, scaling=S, mask_TI=MASK, norm_gradient=norm_gradient)

    error = jnp.abs(getattr(autodiff(norm_gradient, mask_TI=MASK), field) - getattr(closed, field))

    assert bool(jnp.all(error <= dropped_bound(field, norm_gradient)))


@pytest.mark.parametrize("norm_gradient", ["constant", "full"])
@pytest.mark.parametrize("field", FIELDS)
def test_g1_holds_at_zero_rows(field: str, norm_gradient: NormGradient) -> None:
    """Autodiff and the closed form agree, and are finite, where a row is all zeros (D7)."""
    W_OI = W.at[2].set(0)
    adapter = replace(ADAPTER, lora_B=ADAPTER.lora_B.at[2].set(0))
    closed = gradients.closed_form(X, W_OI, adapter, G_TO=G, scaling=S, norm_gradient=norm_gradient)

    error = jnp.abs(getattr(autodiff(norm_gradient, W_OI=W_OI, adapter=adapter), field) - getattr(closed, field))

    assert bool(jnp.all(error <= bound(field, norm_gradient)))


def directions() -> dict[str, tuple[Array, Adapter]]:
    """One direction a field: a Gaussian one in the field, zeros in the others."""
    zeros = jax.tree.map(jnp.zeros_like, (X, ADAPTER))
    steps = {field: normal(*getattr(ADAPTER, field).shape, seed=6) for field in FIELDS[:3]}
    along = {field: (zeros[0], replace(zeros[1], **{field: step})) for field, step in steps.items()}
    return along | {"x": (normal(TOKENS, IN, seed=6), zeros[1])}


def test_d7_the_surrogate_is_zero_where_the_norm_is() -> None:
    """There alone: a norm of one gives twice what a norm of two does, whatever the other rows' are."""
    norms_O = jnp.ones(OUT).at[0].set(0)

    y_TO = gradients.surrogate(X, W, ADAPTER, n_O=norms_O, scaling=S)
    half_TO = gradients.surrogate(X, W, ADAPTER, n_O=norms_O + 1, scaling=S)

    assert not y_TO[:, 0].any()
    assert half_TO[:, 0].all()
    assert jnp.array_equal(y_TO[:, 1:], 2 * half_TO[:, 1:])
    assert y_TO[:, 1:].all()


@MASKS
@pytest.mark.parametrize("field", FIELDS)
def test_g2_closed_form_equals_a_complex_step_of_the_surrogate(field: str, mask_TI: Array | None) -> None:
    """Values alone, with the norm held, give the closed form's derivative along any direction."""
    along = directions()[field]
    step = along[0] if field == "x" else getattr(along[1], field)

    def loss(at: tuple[Array, Adapter]) -> Array:
        x_TI, adapter = at
        mask = None if mask_TI is None else mask_TI.astype(x_TI.dtype)
        y_TO = gradients.surrogate(x_TI, W.astype(x_TI.dtype), adapter, n_O=NORM, scaling=S, mask_TI=mask)
        return jnp.sum(G.astype(x_TI.dtype) * y_TO)

    got = gradients.complex_step(loss, (X, ADAPTER), along)

    closed = getattr(gradients.closed_form(X, W, ADAPTER, G_TO=G, scaling=S, mask_TI=mask_TI), field)
    chain = step.size + TOKENS * OUT  # both sums end in one over the whole tensor
    limit = jnp.sum((dropped_bound(field, "constant") + 2 * chain * UNIT_ROUNDOFF * jnp.abs(closed)) * jnp.abs(step))
    assert abs(float(got - jnp.sum(closed * step))) <= float(limit)


@pytest.mark.parametrize("field", ["lora_A", "lora_B"])
def test_g2_differences_of_the_layer_itself_contradict_d5(field: str) -> None:
    """A difference of the raw forward sees the norm move: it gives the full gradient, far from that of D5."""
    step = getattr(directions()[field][1], field)
    h = 2.0**-17  # near the cube root of the unit roundoff, where a central difference is best

    def loss(shift: float) -> float:
        adapter = replace(ADAPTER, **{field: getattr(ADAPTER, field) + shift * step})
        return float(jnp.sum(G * dora.forward(X, W, adapter, scaling=S)))

    difference = (loss(h) - loss(-h)) / (2 * h)
    constant, full = (
        float(
            jnp.sum(
                getattr(gradients.closed_form(X, W, ADAPTER, G_TO=G, scaling=S, norm_gradient=option), field) * step
            )
        )
        for option in ("constant", "full")
    )
    assert abs(difference - full) < abs(constant - full) / 1000


def test_g2_surrogate_equals_the_layer() -> None:
    """At the norm that the layer has, the surrogate is the layer, to the bit."""
    y_TO = gradients.surrogate(X, W, ADAPTER, n_O=NORM, scaling=S)

    assert y_TO.tolist() == dora.forward(X, W, ADAPTER, scaling=S).tolist()
