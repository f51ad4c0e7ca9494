"""D16: experts, each a layer by itself. Exactly representable numbers: any two routes agree to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ref import dora, experts
from ref.types import Adapter

COUNT, OUT, IN, R, S = 4, 6, 16, 2, 0.5
VISITS = jnp.array([0, 2, 2, 0, 1, 2, 0])  # nobody visits expert 3
FIELDS = ("lora_A", "lora_B", "magnitude")


@pytest.fixture(scope="module")
def it():
    """Rows of V have 16 numbers of +-1, so that every norm is 4."""
    generator = np.random.default_rng(0)

    def integers(*shape, low=-2, high=3):
        return jnp.asarray(generator.integers(low, high, shape), jnp.float32)

    A, B = integers(COUNT, R, IN, low=-1, high=2), integers(COUNT, OUT, R, low=-1, high=2)
    V = integers(COUNT, OUT, IN, low=0, high=2) * 2 - 1
    adapter = Adapter(A, B, 2.0 ** integers(COUNT, OUT, low=0, high=3))
    return integers(len(VISITS), IN), V - S * jnp.einsum("eor,eri->eoi", B, A), adapter, integers(len(VISITS), OUT)


def one(tree, e):
    """Expert e's part of every array."""
    return jax.tree.map(lambda array: array[e], tree)


def derivatives(it):
    """By autodiff: of x and the adapter."""
    x, W, adapter, G = it
    _, back = jax.vjp(lambda x, a: experts.experts(x, VISITS, W, a, scaling=S), x, adapter)
    return back(G)


def test_d16_every_visit_is_the_layer_of_its_expert(it):
    """Tokens of two experts do not meet."""
    x, W, adapter, _ = it

    y = experts.experts(x, VISITS, W, adapter, scaling=S)

    for visit, e in enumerate(VISITS.tolist()):
        alone = dora.forward(x[visit : visit + 1], W[e], one(adapter, e), scaling=S)
        assert (y[visit] == alone[0]).all()


def test_d16_closed_form_is_autodiffs(it):
    """Of the adapter and of x."""
    x, W, adapter, G = it
    dx, found = derivatives(it)

    closed = experts.experts_closed_form(x, VISITS, W, adapter, G_SO=G, scaling=S)

    for field in FIELDS:
        assert (getattr(closed, field) == getattr(found, field)).all()
    assert (closed.x == dx).all()


def test_d16_an_expert_without_tokens_has_no_gradient(it):
    """Exactly 0, also where its weight is all zeros; every other's is not."""
    x, W, adapter, G = it
    _, found = derivatives((x, W.at[3].set(0), adapter, G))

    for field in FIELDS:
        array = getattr(found, field)
        assert (array[3] == 0).all()
        assert all(bool((array[e] != 0).any()) for e in range(3))


def test_d16_dropout_is_drawn_for_each_visit(it):
    """The mask has a row a visit."""
    x, W, adapter, _ = it
    mask = 2.0 * (np.arange(x.size).reshape(x.shape) % 3 > 0)

    y = experts.experts(x, VISITS, W, adapter, scaling=S, mask_SI=jnp.asarray(mask, jnp.float32))

    alone = dora.forward(x[:1], W[0], one(adapter, 0), scaling=S, mask_TI=jnp.asarray(mask[:1], jnp.float32))
    assert (y[0] == alone[0]).all()
    assert (y != experts.experts(x, VISITS, W, adapter, scaling=S)).any()


def test_d16_merged_experts_do_what_they_did(it):
    """D10, expert by expert."""
    x, W, adapter, _ = it

    merged = experts.merge_experts(W, adapter, scaling=S)

    y = experts.experts(x, VISITS, W, adapter, scaling=S)
    assert (jnp.einsum("si,soi->so", x, merged[VISITS]) == y).all()
