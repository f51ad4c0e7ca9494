"""The bounds hold what honest arithmetic gives, by every route, and let no planted bug through."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import bounds
from parity.bounds import BFLOAT16_COMPUTE, FLOAT32, FLOAT64, Rule, Tracked, difference, exact, limit, propagate
from parity.bounds import tracked as tr
from parity.bounds.layers import Adapter, forward, prepare
from parity.bounds.passes import relu_backward

sys.path.insert(0, str(Path(__file__).parent))
from dora_routes import ROUTES, TENSORS, direct, gaussian, half_of_one_rank, rounded, train

U = FLOAT32.unit
SGD = {"steps": 2, "rule": Rule(lr=2.0**-6, momentum=0.5)}
PRECISIONS = {
    "float32": (FLOAT32, {}, {}),
    "bfloat16-base": (FLOAT32, {"base": torch.bfloat16}, {}),
    "bfloat16-compute": (
        BFLOAT16_COMPUTE,
        {"base": torch.bfloat16, "data": torch.bfloat16},
        {"compute": torch.bfloat16},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def deviations(history, predicted, *, kinds=("gradient", "parameter", "optimizer:momentum_buffer")):
    """`(error, standard deviation, limit, guard)` of every claimed element, flat."""
    rows = [[], [], [], []]
    for step, tensors in zip(history, predicted, strict=True):
        for key, got in step.items():
            if key[1] not in kinds:
                continue
            bound = tensors[key]
            claimed = ~bound.no_claim
            columns = np.abs(got - bound.value), np.sqrt(bound.variance), limit(bound), bound.guard
            for row, column in zip(rows, columns, strict=True):
                row.append(column[claimed])
    return [np.concatenate(row) for row in rows]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_honest_routes_stay_within_the_bound(route, precision, world):
    """By any route the error is about one standard deviation, below 16 of them, and below the guard."""
    formats, drawn, computed = PRECISIONS[precision]
    layers, x, G = gaussian(7, **drawn)

    history = train(layers, x, G, route=route, world=world, **computed)
    error, sigma, gate, guard = deviations(
        history, propagate(layers, x, G, scaling=2.0, precision=formats, world=world, **SGD)
    )

    assert np.all(error <= guard)
    assert np.all(error <= gate / 2)  # with room: half the gate
    assert 0.3 < np.sqrt(np.mean((error / sigma) ** 2)) < 1.2  # the model's own 1, neither loose nor short


@pytest.mark.parametrize("shape", [((1, 64),), ((64, 1),), ((65, 33),), ((96, 50), (50, 33))], ids=str)
def test_odd_shapes_stay_within_the_bound(shape):
    """A single row, a single column and uneven stacks are bounded like any other."""
    layers, x, G = gaussian(3, shapes=shape, tokens=13, rank=1)

    error, _, gate, guard = deviations(train(layers, x, G), propagate(layers, x, G, scaling=2.0, **SGD))

    assert np.all(error <= np.minimum(gate, guard))


def test_relu_stack_stays_within_the_bound():
    """Where no sign is in doubt, a ReLU stack is claimed whole and holds."""
    layers, x, G = gaussian(5)
    predicted = propagate(layers, x, G, scaling=2.0, activation="relu", **SGD)

    error, _, gate, _ = deviations(train(layers, x, G, relu=True), predicted)

    assert not any(tensor.no_claim.any() for step in predicted for tensor in step.values())
    assert np.all(error <= gate)


def test_float64_is_bounded_by_its_own_unit():
    """Two float64 computations differ by less than the bound of the two, at 2^-53."""
    layers, x, G = gaussian(2)
    predicted = propagate(layers, x, G, scaling=2.0, precision=FLOAT64, d9=True, **SGD)

    history = train(layers, x, G, dtype=torch.float64, how={"form": "d9"})
    worst = max(
        np.max(np.abs(got - b.value) / limit(difference(b, b)))
        for step, tensors in zip(history, predicted, strict=True)
        for key, got in step.items()
        for b in [tensors[key]]
    )

    assert 0 < worst < 1


FAULTS = {
    "norm-not-detached": {"how": {"norm": direct}},
    "one-rank-halved": {"spoil": half_of_one_rank},
    "scaling-off-by-a-thousandth": {"s": 2.002},
    "alpha-ignored": {"s": 1.0},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_planted_fault_exceeds_the_bound(fault, name):
    """Each bug moves some element of A's and of B's gradient beyond its limit."""
    layers, x, G = gaussian(11)
    predicted = propagate(layers, x, G, scaling=2.0, world=2)[0]["layers.0." + name, "gradient"]

    got = train(layers, x, G, steps=1, world=2, **FAULTS[fault])[0]["layers.0." + name, "gradient"]

    assert np.any(np.abs(got - predicted.value) > limit(predicted))


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_magnitude_held_in_bfloat16_exceeds_the_bound(name):
    """D11: a magnitude rounded to bf16 moves the gradients of its own layer beyond their limits."""
    layers, x, G = gaussian(11)
    narrow = [replace(layer, magnitude=rounded(layer.magnitude, torch.bfloat16)) for layer in layers]
    predicted = propagate(layers, x, G, scaling=2.0)[0]["layers.0." + name, "gradient"]

    got = train(narrow, x, G, steps=1)[0]["layers.0." + name, "gradient"]

    assert np.mean(np.abs(got - predicted.value) > limit(predicted)) > 0.5


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude"])
def test_doubled_row_exceeds_the_bound_in_every_element(name):
    """A row counted twice is beyond the limit in each of its elements, in float32."""
    layers, x, G = gaussian(11)
    predicted = propagate(layers, x, G, scaling=2.0)[0]["layers.1." + name, "gradient"]

    row = np.abs(predicted.value[0])

    assert np.all(row > limit(predicted)[0])


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5], ids=lambda s: f"{s:.0e}")
def test_d13_cancelling_rows_stay_within_the_bound(spread):
    """W near -sBA: the bound is that of the guarded norm, and the guarded norm is inside it."""
    generator = np.random.default_rng(0)
    layers, x, G = gaussian(4, shapes=((64, 64),))
    weight = -2 * layers[0].lora_B @ layers[0].lora_A + spread * generator.standard_normal((64, 64))
    layers = [replace(layers[0], weight=rounded(weight))]

    history = train(layers, x, G, steps=1, route="factored-product")
    error, _, gate, guard = deviations(history, propagate(layers, x, G, scaling=2.0), kinds=("gradient",))

    assert np.all(error <= np.minimum(gate, guard))
    assert np.isfinite(gate).all()


def test_d13_norm_without_its_guard_exceeds_the_bound():
    """The factored norm of a cancelling row, unguarded, is worse than the bound allows."""
    layers, _, _ = gaussian(4, shapes=((64, 64),))
    A, B = layers[0].lora_A, layers[0].lora_B
    W = rounded(-2 * B @ A + 1e-3 * np.random.default_rng(0).standard_normal((64, 64)))
    predicted = bounds.weight_norm(exact(W), exact(A), exact(B), scaling=2.0, unit=U)

    w, a, b = (torch.tensor(t, dtype=torch.float32) for t in (W, A, B))
    square = (w * w).sum(1) + 4 * ((w @ a.T) * b).sum(1) + 4 * ((b @ (a @ a.T)) * b).sum(1)
    error = np.abs(square.clamp_min(0).sqrt().double().numpy() - predicted.value)

    assert np.mean(error > limit(predicted)) > 0.5


def test_d13_factored_norm_is_allowed_until_ten_bits_cancel():
    """The bound of n covers the factored form while its terms are below 2^10 n^2, and only the direct one beyond."""
    layers, _, _ = gaussian(4, shapes=((64, 64),))
    A, B = layers[0].lora_A, layers[0].lora_B
    delta = np.linalg.norm(2 * B @ A, axis=1)
    unit_rows = np.random.default_rng(0).standard_normal((64, 64))
    unit_rows *= (delta / np.linalg.norm(unit_rows, axis=1))[:, None]

    # |terms| is about 4 ||2BA||^2: a remainder of 2^-3 leaves 2^8 of them, one of 2^-5 leaves 2^12
    below, above = (
        limit(bounds.weight_norm(exact(r * unit_rows - 2 * B @ A), exact(A), exact(B), scaling=2.0, unit=U))
        / (r * delta)
        for r in (2.0**-3, 2.0**-5)
    )

    assert np.all(below > above)


def test_adapter_error_reaches_the_output():
    """An error of A alone, n and c held, widens the output."""
    layers, x, _ = gaussian(1)
    adapter = Adapter(*(exact(getattr(layers[0], name)) for name in TENSORS))
    sure = prepare(exact(layers[0].weight), adapter, scaling=2.0, precision=FLOAT32)
    unsure = replace(sure, lora_A=tr.stirred(sure.lora_A, np.full(sure.lora_A.shape, 1e-10)))

    (_, narrow), (_, wide) = (forward(layer, exact(x)) for layer in (sure, unsure))

    assert np.all(wide.variance > narrow.variance)


def test_d7_zero_rows_are_exact():
    """A row of V that is zero has gradients of exactly zero: its limit is 0, not small."""
    layers, x, G = gaussian(1, shapes=((20, 10),))
    weight, lora_B = layers[0].weight.copy(), layers[0].lora_B.copy()
    weight[3], lora_B[3] = 0, 0
    predicted = propagate([replace(layers[0], weight=weight, lora_B=lora_B)], x, G, scaling=2.0)[0]

    for name in ("lora_B", "magnitude"):
        tensor = predicted[f"layers.0.{name}", "gradient"][3]
        assert np.all(tensor.value == 0)
        assert np.all(limit(tensor) == 0)


def test_norm_that_may_be_zero_gives_no_claim():
    """A row whose V is rounding noise has no claim; its neighbours keep theirs."""
    layers, x, G = gaussian(1, shapes=((20, 10),))
    weight = layers[0].weight.copy()
    weight[3] = rounded(-2 * layers[0].lora_B @ layers[0].lora_A)[3]
    predicted = propagate([replace(layers[0], weight=weight)], x, G, scaling=2.0)[0]

    claims = predicted["layers.0.lora_B", "gradient"].no_claim.all(axis=1)

    assert claims.tolist() == [row == 3 for row in range(10)]
    assert predicted["layers.0.magnitude", "gradient"].no_claim[3]


def test_relu_that_may_flip_gives_no_claim():
    """A cotangent that passes a ReLU within its limit of zero has no claim, and an exact zero keeps its own."""
    y = Tracked(np.array([1e-9, 1.0, -1.0, 1e-9]), np.full(4, 1e-16), np.full(4, 1e-3))
    G = exact(np.array([1.0, 1.0, 1.0, 0.0]))

    passed = relu_backward(G, y)

    assert passed.no_claim.tolist() == [True, False, False, False]
    assert passed.value.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_no_claim_spreads_to_what_it_touches_and_no_further():
    """In a product, no claim reaches each sum that it enters with a factor that is not an exact zero."""
    a = Tracked(np.ones((2, 2)), np.array([[np.inf, 0], [0, 0]]), np.array([[np.inf, 0], [0, 0]]))
    b = exact([[1.0, 0.0], [1.0, 1.0]])

    product = tr.matmul(a, b, U)

    assert product.no_claim.tolist() == [[True, False], [False, False]]
    assert np.isinf(limit(product)).tolist() == [[True, False], [False, False]]


def test_variance_of_a_dot_product_is_its_mean_over_random_orders():
    """The formula for a dot product's variance is what random orders of summation give, within a fifth."""
    generator = np.random.default_rng(0)
    a, b = rounded(generator.standard_normal(64)), rounded(generator.standard_normal(64) + 0.5)
    predicted = tr.matmul(exact(a[None]), exact(b[:, None]), U)
    terms = a * b

    squares = []
    for _ in range(400):
        partial = np.cumsum(generator.permutation(terms))[1:]
        squares.append(U**2 / 3 * (np.sum(partial**2) + np.sum(terms**2)))

    assert abs(np.mean(squares) / predicted.variance[0, 0] - 1) < 0.2


@pytest.mark.parametrize("operation", [tr.add, tr.subtract, tr.multiply, tr.divide])
def test_guard_gates_where_it_is_smaller(operation):
    """One rounding is off by u at most, which is less than 16 of its standard deviations."""
    result = operation(exact([3.0]), exact([7.0]), U)

    assert limit(result) == result.guard == U * np.abs(result.value)


def test_scaling_by_a_power_of_two_rounds_nothing():
    """Multiplying by 2^k is exact; by 3 it is not."""
    assert tr.scale(exact([0.1]), 0.5, U).guard == 0
    assert tr.scale(exact([0.1]), 3.0, U).guard > 0


def test_cast_of_a_number_that_the_format_holds_rounds_nothing():
    """1 + 2^-7 is a bf16 number, 1 + 2^-8 is not: eight significant bits."""
    held = tr.cast(exact([1 + 2.0**-7, 1 + 2.0**-8]), BFLOAT16_COMPUTE.compute_unit)

    assert (held.guard == 0).tolist() == [True, False]


def test_unit_roundoffs_are_half_of_torchs_epsilons():
    """The unit roundoff is half the distance from 1 to the next number: 2^-24, and 2^-8 for bf16 (8 bits)."""
    assert FLOAT32.unit == torch.finfo(torch.float32).eps / 2
    assert FLOAT64.unit == torch.finfo(torch.float64).eps / 2
    assert BFLOAT16_COMPUTE.compute_unit == torch.finfo(torch.bfloat16).eps / 2


def test_parameters_carry_their_error_into_the_second_step():
    """The second gradient's bound is wider than if its parameters were inputs that both sides hold."""
    layers, x, G = gaussian(1)
    first, second = propagate(layers, x, G, scaling=2.0, **SGD)
    moved = [
        replace(layer, **{name: first[f"layers.{k}.{name}", "parameter"].value for name in TENSORS})
        for k, layer in enumerate(layers)
    ]

    anew = propagate(moved, x, G, scaling=2.0)[0]

    gradients = [key for key in anew if key[1] == "gradient" and key[0] != "x"]
    assert all(np.all(second[key].variance > anew[key].variance) for key in gradients)


def test_token_counts_that_do_not_add_up_are_refused():
    """A count a rank, all tokens dealt, or a ValueError that says so."""
    layers, x, G = gaussian(1)

    with pytest.raises(ValueError, match="do not deal 24 tokens to 2 ranks"):
        propagate(layers, x, G, scaling=2.0, world=2, tokens=(10, 10))


def test_difference_of_unlike_shapes_is_refused():
    """Two computations of different tensors have no difference."""
    with pytest.raises(ValueError, match="differ"):
        difference(exact([1.0]), exact([[1.0]]))
