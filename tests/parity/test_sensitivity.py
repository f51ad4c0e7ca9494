"""Noise reaches every operation of a traced function that rounds, wherever it hides, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from parity.oracle import sensitivity as subject
from parity.oracle.sensitivity import SensitivityError, noisy, responses, sensitivity, skip_reason

UNIT = 2.0**-24
SEEDS = range(4)


@pytest.fixture(autouse=True)
def _float64():
    """Noise is put into float64."""
    with jax.enable_x64(True):
        yield


@jax.custom_vjp
def squared(x):
    """A product behind a custom rule."""
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


@jax.custom_jvp
def gated(x):
    """An element-wise function behind a custom rule: no product."""
    return x * jnp.tanh(x)


gated.defjvp(lambda primals, tangents: (gated(*primals), tangents[0] * jnp.tanh(primals[0])))


def attention_loss(weights, x):
    """Three attention blocks in a scan, each checkpointed."""

    @jax.checkpoint
    def block(x, weight):
        scores = jax.nn.softmax((x @ weight) @ x.T)
        return x + gated(scores @ x), None

    x, _ = jax.lax.scan(block, x, weights)
    return jnp.sum(jnp.square(x))


GRADIENT = jax.grad(attention_loss, argnums=(0, 1))


@pytest.fixture
def arguments():
    """Weights of three blocks, and six tokens."""
    generator = np.random.default_rng(3)
    return jnp.asarray(generator.standard_normal((3, 8, 8)) / 8), jnp.asarray(generator.standard_normal((6, 8)))


def levels(jaxpr):
    """The jaxpr and all that it contains."""
    yield jaxpr
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
        for found in inner:
            if isinstance(found, Jaxpr | ClosedJaxpr):
                yield from levels(getattr(found, "jaxpr", found))


def users(jaxpr, primitive):
    """For each equation of a primitive, the names of what consumes it."""
    return [
        [user.primitive.name for user in level.eqns if equation.outvars[0] in user.invars]
        for level in levels(jaxpr)
        for equation in level.eqns
        if equation.primitive.name == primitive
    ]


def counts(fn, *args, primitive="dot_general"):
    """(equations of fn, those of its noisy form, those of them that go into one multiplication and nowhere else)."""
    plain = users(jax.make_jaxpr(fn)(*args).jaxpr, primitive)
    noise = users(jax.make_jaxpr(noisy(fn, unit=UNIT))(jax.random.key(0), *args).jaxpr, primitive)
    return len(plain), len(noise), noise.count(["mul"])


def branching(x):
    """Products in a loop's body, in its test, in a branch, behind custom rules and in a nested jit."""
    x = jax.lax.while_loop(lambda s: jnp.vdot(s, s) < 9.0, lambda s: s + 0.1 * (s @ s), x)
    x = jax.lax.cond(x[0, 0] > 0, squared, lambda y: y @ y.T, x)
    return jax.jit(lambda y: gated(y) @ y)(x)


def test_zero_unit_is_the_function_itself(arguments):
    """Without noise the interpreted function gives the plain result, but for float64 rounding.

    (Not to the bit: where noise stands between two operations, XLA doesn't fuse them.)
    """
    roundings = 1000  # more than lie on any path through the function
    plain = jax.tree.leaves(GRADIENT(*arguments))

    interpreted = jax.tree.leaves(noisy(GRADIENT, unit=0.0)(jax.random.key(0), *arguments))

    for exact, found in zip(plain, interpreted, strict=True):
        assert jnp.linalg.norm(found - exact) <= roundings * 2.0**-53 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("primitive", ["exp", "reduce_sum", "tanh", "div"])
def test_elementwise_functions_and_sums_draw_noise(arguments, primitive):
    """What rounds without being a matrix product is perturbed as well."""
    found, kept, perturbed = counts(GRADIENT, *arguments, primitive=primitive)

    assert found == kept == perturbed > 0


def test_every_product_of_scan_and_checkpoint_draws_noise(arguments):
    """Forward, recomputed and backward products of a checkpointed scan each have their own draw."""
    found, kept, perturbed = counts(GRADIENT, *arguments)

    assert found == kept == perturbed == 12  # 3 forward, 3 computed again, 6 backward


def test_every_product_of_control_flow_draws_noise():
    """Products in while, cond, custom rules and jit are reached too."""
    found, kept, perturbed = counts(branching, jnp.eye(3))

    assert found == kept == perturbed == 5


def test_each_element_is_perturbed_both_ways_by_at_most_the_unit():
    """A product moves, in every element, up or down, by at most unit times itself."""
    a = jnp.arange(1.0, 10.0).reshape(3, 3)

    moved = noisy(jnp.matmul, unit=1e-3)(jax.random.key(1), a, a) / (a @ a) - 1

    assert jnp.all(moved != 0)
    assert jnp.min(moved) < 0 < jnp.max(moved)
    assert jnp.max(jnp.abs(moved)) <= 1e-3


def test_equal_products_of_one_level_have_different_noise():
    """The same product written twice, once inside a jit, is perturbed twice."""
    a = jnp.ones((3, 3))

    first, second = noisy(lambda a: (a @ a, jax.jit(jnp.matmul)(a, a)), unit=1e-3)(jax.random.key(0), a)

    assert not jnp.any(first == second)


def test_a_loop_and_its_surroundings_have_different_noise():
    """A scan's iterations share no noise with a product beside it, nor with a second scan."""

    def scanned(a):
        return jax.lax.scan(lambda carry, _: (carry, a @ a), 0.0, None, length=2)[1]

    outside, one, other = noisy(lambda a: (a @ a, scanned(a), scanned(a)), unit=1e-3)(
        jax.random.key(0), jnp.ones((3, 3))
    )

    values = np.stack([outside, *one, *other])
    assert len(np.unique(values)) == values.size


def test_scan_draws_anew_in_each_iteration():
    """Two iterations of a scan don't share their noise."""

    def same_product_twice(a):
        return jax.lax.scan(lambda carry, _: (carry, a @ a), 0.0, None, length=2)[1]

    first, second = noisy(same_product_twice, unit=1e-3)(jax.random.key(0), jnp.ones((3, 3)))

    assert not jnp.any(first == second)


def test_response_is_linear_in_the_unit(arguments):
    """A unit a thousand times larger moves the result a thousand times further."""
    small = sensitivity(GRADIENT, arguments, unit=1e-9, seeds=SEEDS)

    large = sensitivity(GRADIENT, arguments, unit=1e-6, seeds=SEEDS)

    assert np.allclose(np.array(large) / np.array(small), 1e3, rtol=1e-2)


def test_response_of_one_product_is_the_uniform_noise_of_its_elements():
    """The rms response of a lone product is unit ||product|| / sqrt(3): nothing else is added."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)))

    exact, rms = responses(jnp.matmul, (a, a), unit=UNIT, seeds=range(8))

    expected = UNIT * float(jnp.linalg.norm(exact)) / np.sqrt(3)
    assert abs(rms / expected - 1) < 0.02  # 32,768 draws: six standard deviations of their mean square


def test_response_has_the_results_structure(arguments):
    """One float a leaf, in the pytree that the function returns."""
    exact, rms = responses(lambda w, x: {"g": GRADIENT(w, x)}, arguments, unit=UNIT, seeds=SEEDS)

    assert jax.tree.structure(exact) == jax.tree.structure(rms)
    assert all(isinstance(leaf, float) and leaf > 0 for leaf in jax.tree.leaves(rms))


def test_one_compilation_serves_all_seeds(arguments):
    """The key is an argument: a second seed does not trace the function again."""
    traces = []

    def traced(*args):
        traces.append(1)
        return GRADIENT(*args)

    responses(traced, arguments, unit=UNIT, seeds=range(5))

    assert len(traces) == 1


def test_noise_in_too_narrow_a_product_is_refused():
    """A float32 product would round noise of 2^-24 away in silence."""
    a = jnp.ones((2, 2), jnp.float32)

    with pytest.raises(SensitivityError, match=r"float32.*trace in float64"):
        noisy(jnp.matmul, unit=UNIT)(jax.random.key(0), a, a)


def test_no_seed_is_refused(arguments):
    """Without a seed there is no response, rather than a response of zero."""
    with pytest.raises(SensitivityError, match="no seed"):
        sensitivity(GRADIENT, arguments, unit=UNIT, seeds=())


def test_unknown_primitive_around_a_product_is_refused(monkeypatch):
    """A product that can't be reached is an error, never a product without noise."""
    monkeypatch.setattr(subject, "_CONTROL", {})

    with pytest.raises(SensitivityError, match="inside the primitive"):
        noisy(branching, unit=UNIT)(jax.random.key(0), jnp.eye(3))


@pytest.mark.parametrize(("response", "skipped"), [(0.9, False), (1.1, True)], ids=["within", "beyond"])
def test_skipped_where_the_tolerance_exceeds_a_tenth_of_the_norm(response, skipped):
    """32 rms beyond a tenth of the 2-norm is skipped with a reason; just within it is not."""
    norm = 320.0

    assert (skip_reason(response, norm) is not None) == skipped
