"""Repeated tokens are bounded by their own covariance; correlated ones that do not repeat are refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.bounds import (
    FLOAT32,
    InputsNotIndependent,
    Tracked,
    exact,
    limit,
    propagate,
    require_independent,
)
from parity.bounds import tracked as tr
from parity.bounds.repeats import Repeats, alike, coherence, inner, product

sys.path.insert(0, str(Path(__file__).parent))
from dora_routes import ROUTES, gaussian, rounded, train

U = FLOAT32.unit
SHAPES = {"one layer": ((96, 20),), "two layers": ((96, 50), (50, 33))}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def repeated(x, G, generator):
    """One token, again and again."""
    del generator
    return np.repeat(x[:1], len(x), axis=0), np.repeat(G[:1], len(G), axis=0)


def constant(x, G, generator):
    """Every number of x the same, and every number of G."""
    del generator
    return np.full_like(x, x[0, 0]), np.full_like(G, G[0, 0])


def prompts(x, G, generator):
    """Eight tokens, each many times, in random order."""
    chosen = generator.integers(8, size=len(x))
    return x[chosen], G[chosen]


def padded(x, G, generator):
    """Half of the tokens the same, with a cotangent of their own."""
    half = generator.permutation(len(x))[: len(x) // 2]
    x = x.copy()
    x[half] = x[half[0]]
    return x, G


def one_cotangent(x, G, generator):
    """The same cotangent for all tokens."""
    del generator
    return x, np.repeat(G[:1], len(G), axis=0)


def nearly(x, G, generator):
    """One token, again and again, but for a millionth."""
    x, G = repeated(x, G, generator)
    return tuple(rounded(t * (1 + 1e-6 * generator.standard_normal(t.shape))) for t in (x, G))


KINDS = (repeated, constant, prompts, padded, one_cotangent, nearly)


def worst(layers, x, G, *, route="direct-product", world=1):
    """The largest error of float32 code's gradients over its limit."""
    got = train(layers, x, G, steps=1, route=route, world=world)[0]
    tracked = propagate(layers, x, G, scaling=2.0, world=world)[0]
    keys = [key for key in got if key[1] == "gradient"]
    return max(float(np.max(np.abs(got[key] - tracked[key].value) / limit(tracked[key]))) for key in keys)


@pytest.mark.parametrize("tokens", [24, 256, 1024])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_repeats_stay_within_the_bound(shapes, kind, tokens):
    """Honest float32 code on tokens that repeat lies within half of its limit, by every route."""
    layers, x, G = gaussian(11, shapes=shapes, tokens=tokens)
    x, G = kind(x, G, np.random.default_rng(1))

    assert max(worst(layers, x, G, route=route) for route in ROUTES) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_on_several_ranks_stay_within_the_bound(kind):
    """Ranks that see the same tokens make the same errors, whose mean is no smaller."""
    layers, x, G = gaussian(11, shapes=SHAPES["two layers"], tokens=256)
    x, G = kind(x, G, np.random.default_rng(1))

    assert worst(layers, x, G, world=4) < 0.5


@pytest.mark.parametrize(("tokens", "error"), [(24, 1e-4), (256, 1e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_bound_of_repeats_sees_small_errors(kind, tokens, error):
    """This relative error is beyond the limit in half of every gradient's elements, however many tokens repeat."""
    layers, x, G = gaussian(11, shapes=SHAPES["two layers"], tokens=tokens)
    x, G = kind(x, G, np.random.default_rng(1))

    tracked = propagate(layers, x, G, scaling=2.0)[0]

    gradients = [b for (name, kind_), b in tracked.items() if kind_ == "gradient" and name != "x"]
    assert all(np.mean(error * np.abs(b.value) > limit(b)) > 0.5 for b in gradients)


def test_independent_model_breaks_on_repeats():
    """What the covariance is for: taken for tokens of their own, like terms added one by one exceed the limit."""
    G, y0 = (np.repeat(rounded(np.random.default_rng(seed).standard_normal((1, 64))), 1024, axis=0) for seed in (0, 1))
    group = np.zeros(1024, dtype=np.intp)
    terms = G.astype(np.float32) * y0.astype(np.float32)

    got = np.cumsum(terms, axis=0, dtype=np.float32)[-1].astype(np.float64)
    alone, together = (inner(exact(G), exact(y0), r, unit=U, output_unit=U) for r in (None, Repeats(group, group)))

    assert np.max(np.abs(got - alone.value) / limit(alone)) > 1
    assert np.max(np.abs(got - together.value) / limit(together)) < 0.5


def test_tokens_of_their_own_are_bounded_as_before():
    """Groups of one token each change nothing."""
    generator = np.random.default_rng(0)
    a, b = (Tracked(*(np.abs(generator.standard_normal((3, 30, 7))))) for _ in range(2))
    own = Repeats(np.arange(30), np.arange(30))

    for function in (product, inner):
        one, other = (function(a, b, repeats, unit=U, output_unit=2.0**-8) for repeats in (None, own))
        assert np.allclose(one.variance, other.variance, rtol=1e-12)
        assert np.array_equal(one.guard, other.guard)


def test_like_errors_add_up():
    """One error that meets k like tokens is worth k^2 variances in the sum over them."""
    sure, unsure = exact(np.ones((16, 1))), tr.stirred(exact(np.ones((16, 1))), np.full((16, 1), 1e-6))
    group = np.zeros(16, dtype=np.intp)

    together = inner(sure, unsure, Repeats(group, group), unit=U, output_unit=U)

    assert together.variance[0] == pytest.approx(256e-6, rel=1e-6)


def test_like_errors_that_cancel_are_still_counted_once_each():
    """Where weights of both signs cancel, the errors count at least as if they were independent."""
    signs = exact(np.tile([[1.0], [-1.0]], (8, 1)))
    unsure = tr.stirred(exact(np.ones((16, 1))), np.full((16, 1), 1e-6))

    together = inner(signs, unsure, Repeats(np.zeros(16, dtype=np.intp), np.arange(16)), unit=U, output_unit=U)

    assert together.variance[0] == pytest.approx(16e-6, rel=1e-6)


def test_groups_reach_through_others():
    """A token that is near another's neighbour belongs to the same group; one further off does not."""
    rows = np.array([[1.0, 0.0], [1.0 + 0.9e-3, 0.0], [1.0 + 1.8e-3, 0.0], [1.1, 0.0]])

    assert alike(rows, 1e-3).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_correlated_tokens_of_a_deep_stack_are_refused(noise):
    """Tokens around a mean, in x and in G, are named with the value, the place and the mend."""
    layers, x, G = gaussian(1, shapes=SHAPES["two layers"], tokens=256)
    x, G = (rounded(t[:1] + noise * t) for t in (x, G))

    with pytest.raises(
        InputsNotIndependent, match=r"layers.0, x \(256, 96\) .* were one, above 4 \(take away the mean"
    ):
        propagate(layers, x, G, scaling=2.0)


@pytest.mark.parametrize("tokens", [24, 256, 1024])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_correlated_tokens_of_one_layer_stay_within_the_bound(noise, tokens):
    """Within one layer the errors of A, B and c are coherent whatever the tokens, so nothing is refused."""
    layers, x, G = gaussian(1, shapes=SHAPES["one layer"], tokens=tokens)
    x, G = (rounded(t[:1] + noise * t) for t in (x, G))

    assert max(worst(layers, x, G, route=route) for route in ROUTES) < 0.5


def test_relu_features_that_meet_one_cotangent_are_refused():
    """Features of one sign add up under a cotangent of one sign, though x has no mean."""
    layers, x, G = gaussian(1, shapes=SHAPES["two layers"], tokens=256)
    x, G = one_cotangent(x, G, None)

    with pytest.raises(InputsNotIndependent, match=r"layers.1"):
        propagate(layers, x, G, scaling=2.0, activation="relu")


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("tokens", [8, 24, 256])
def test_gaussian_tokens_are_inside_the_domain(tokens, activation):
    """Ordinary numbers are not refused, at any layer of any shape that cases have, nor means of x alone."""
    for shapes in (((96, 50), (50, 33)), ((40, 27), (27, 30)), ((67, 33), (33, 19)), ((64, 1), (1, 64))):
        layers, x, G = gaussian(1, shapes=shapes, tokens=tokens, rank=2)

        assert propagate(layers, x, G, scaling=2.0, activation=activation)
        assert propagate(layers, rounded(x + 3), G, scaling=2.0, activation=activation)


def test_coherence_counts_what_adds_up():
    """Tokens all the same count as many as they are; alike ones, put into one group, as one."""
    x, G = np.ones((10, 4)), np.ones((10, 3))

    assert coherence(x, G, np.arange(10)) == pytest.approx(10)
    assert coherence(x, G, np.zeros(10, dtype=np.intp)) == pytest.approx(1)


def test_tokens_without_a_cotangent_are_inside_the_domain():
    """A rank whose cotangent is zero adds nothing to anything."""
    require_independent(np.ones((4, 2)), np.zeros((4, 2)))


def test_a_mean_in_both_is_named():
    """A caller may ask for the value, the place and the mend without propagating anything."""
    with pytest.raises(InputsNotIndependent, match=r"the tokens of layers.3, .* add up as if 10 were one"):
        require_independent(np.ones((10, 2)), np.ones((10, 3)), place="layers.3")
