"""Clauses D1 to D13, one by one, on the smallest input that tells right from wrong."""

import inspect
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from ref import dora
from ref.types import Adapter, InputError

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
S = 0.5


def gaussian(*shape: int, seed: int = 0, dtype: type = jnp.float64) -> Array:
    """Fixed Gaussian numbers: the shape and the seed say which."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def layer(out: int, width: int, rank: int, *, dtype: type = jnp.float64) -> tuple[Array, Array, Adapter]:
    """Input, weight and a trained adapter."""
    x_TI, W_OI = gaussian(5, width, dtype=dtype), gaussian(out, width, seed=1, dtype=dtype)
    A_RI, B_OR = gaussian(rank, width, seed=2, dtype=dtype), gaussian(out, rank, seed=3, dtype=dtype)
    return x_TI, W_OI, Adapter(A_RI, B_OR, 1 + jnp.abs(gaussian(out, seed=4, dtype=dtype)))


def untrained(out: int, width: int, rank: int, *, dtype: type) -> tuple[Array, Array, Adapter]:
    """The same before training: B is 0, and the magnitude is the one that D6 gives."""
    x_TI, W_OI, adapter = layer(out, width, rank, dtype=dtype)
    B_OR = jnp.zeros_like(adapter.lora_B)
    return x_TI, W_OI, Adapter(adapter.lora_A, B_OR, dora.initial_magnitude(W_OI, adapter.lora_A, B_OR, scaling=S))


def ulps(got: Array, want: Array) -> float:
    """The largest distance in units in the last place."""
    return float(jnp.max(jnp.abs(got - want) / jnp.asarray(np.spacing(np.abs(np.asarray(want))))))


@pytest.mark.parametrize(("rank_stabilized", "want"), [(False, 2.0), (True, 4.0)], ids=["plain", "rank-stabilised"])
def test_d1_scaling(*, rank_stabilized: bool, want: float) -> None:
    """The scaling is alpha over the rank, or over its root."""
    assert dora.scaling(8.0, 4, rank_stabilized=rank_stabilized) == want


def test_d1_a_rank_of_one_is_the_least() -> None:
    """A product of a column and a row has a scaling as any other."""
    assert dora.scaling(8.0, 1) == dora.scaling(8.0, 1, rank_stabilized=True) == 8.0


@pytest.mark.parametrize(("alpha", "rank"), [(0.0, 4), (-1.0, 4), (math.nan, 4), (math.inf, 4), (8.0, 0)])
def test_d1_scaling_refuses(alpha: float, rank: int) -> None:
    """A scaling that would be zero, undefined or not finite is refused."""
    with pytest.raises(InputError, match=r"alpha|rank"):
        dora.scaling(alpha, rank)


def test_d2_direction() -> None:
    """The direction is W plus s times B A, in this order of factors."""
    W_OI, A_RI, B_OR = jnp.ones((2, 3)), jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([[1.0], [10.0]])

    V_OI = dora.direction(W_OI, A_RI, B_OR, scaling=2.0)

    assert V_OI.tolist() == [[3, 5, 7], [21, 41, 61]]


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 2), (2, 1, 2, 2)], ids=["linear", "conv1d", "conv2d"])
def test_d3_axis(shape: tuple[int, ...]) -> None:
    """There is one norm per output feature, over every other axis."""
    V_OK = jnp.asarray([[1.0, 1, 1, 1], [0, 3, 4, 0]]).reshape(shape)

    assert dora.weight_norm(V_OK).tolist() == [2, 5]


@DTYPES
@pytest.mark.parametrize("size", [1e-37, 1e-25, 1.0, 1e20, 3e37], ids=str)
def test_d4_norm_neither_overflows_nor_underflows(dtype: type, size: float) -> None:
    """The norm of a row is right wherever it is a normal number, however small or large its squares."""
    row_1K = jnp.full((1, 4), size, dtype)

    assert dora.weight_norm(row_1K).tolist() == [2 * float(row_1K[0, 0])]


def test_d4_rows_are_divided_by_a_power_of_two() -> None:
    """Which rounds nothing; and it is so near that the quotient stays far from both ends of the range."""
    largest_O = jnp.asarray([0.3, 1.0, 1.4, 1.75, 3.0, 7.9, 1e-30, 1e30], jnp.float32)

    power_O = dora.power_of_two(largest_O)

    assert {math.frexp(power)[0] for power in power_O.tolist()} == {0.5}
    assert bool(jnp.all((largest_O / power_O >= 0.5) & (largest_O / power_O <= 2)))


@DTYPES
def test_d4_norm_is_zero_only_for_zeros(dtype: type) -> None:
    """A row with one smallest normal number in it has a norm above 0."""
    V_OK = jnp.zeros((2, 3), dtype).at[1, 2].set(jnp.finfo(dtype).tiny)

    assert (dora.weight_norm(V_OK) == 0).tolist() == [True, False]


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_d4_norm_is_float32_or_wider(narrow: type) -> None:
    """The norm of a narrow weight is the float32 norm of its numbers."""
    V_OK = gaussian(3, 40).astype(narrow)

    n_O = dora.weight_norm(V_OK)

    assert n_O.dtype == jnp.float32
    assert n_O.tolist() == dora.weight_norm(V_OK.astype(jnp.float32)).tolist()


def test_d4_nan_stays_visible() -> None:
    """A NaN in a row is a NaN in its norm and in its ratio, never a zero row."""
    V_OK = jnp.ones((2, 3)).at[0, 1].set(jnp.nan)

    c_O = dora.ratio(jnp.ones(2), dora.weight_norm(V_OK))

    assert jnp.isnan(c_O).tolist() == [True, False]


def test_d5_norm_is_constant() -> None:
    """The gradient of the layer is that of the layer with its norm replaced by the number it is."""
    x_TI, W_OI, adapter = layer(3, 4, 2)
    n_O = dora.weight_norm(dora.direction(W_OI, adapter.lora_A, adapter.lora_B, scaling=S))

    def frozen(adapter: Adapter) -> Array:
        c_O = adapter.magnitude / n_O
        return jnp.sum(dora.forward_with_ratio(x_TI, W_OI, adapter, c_O=c_O, scaling=S) ** 2)

    got = jax.grad(lambda a: jnp.sum(dora.forward(x_TI, W_OI, a, scaling=S) ** 2))(adapter)
    want = jax.grad(frozen)(adapter)
    assert got.lora_B.tolist() == want.lora_B.tolist()
    assert got.lora_A.tolist() == want.lora_A.tolist()


def test_d5_full_gradient_is_another_function() -> None:
    """Differentiating through the norm changes dA and dB, never the output and never dm."""
    x_TI, W_OI, adapter = layer(3, 4, 2)

    def values(norm_gradient: str) -> tuple[Array, Adapter]:
        y_TO, pull = jax.vjp(lambda a: dora.forward(x_TI, W_OI, a, scaling=S, norm_gradient=norm_gradient), adapter)
        return y_TO, pull(y_TO)[0]

    (y_TO, constant), (y_full_TO, full) = values("constant"), values("full")
    assert y_TO.tolist() == y_full_TO.tolist()
    assert constant.magnitude.tolist() == full.magnitude.tolist()
    assert not bool(jnp.any(constant.lora_A == full.lora_A))
    assert not bool(jnp.any(constant.lora_B == full.lora_B))


def test_d5_unknown_norm_gradient_is_refused() -> None:
    """A misspelt option is refused instead of being read as the other one."""
    x_TI, W_OI, adapter = layer(3, 4, 2)

    with pytest.raises(InputError, match="constnat"):
        inspect.unwrap(dora.forward)(x_TI, W_OI, adapter, scaling=S, norm_gradient="constnat")


def test_d6_magnitude_at_start() -> None:
    """The first magnitude is the norm of W + s B0 A0, not of W alone, in float32 for a narrow weight."""
    W_OI = jnp.asarray([[3.0, 0.0]], jnp.bfloat16)
    A_RI, B_OR = jnp.asarray([[0.0, 8.0]], jnp.float32), jnp.ones((1, 1), jnp.float32)

    m_O = dora.initial_magnitude(W_OI, A_RI, B_OR, scaling=S)

    assert m_O.dtype == jnp.float32
    assert m_O.tolist() == [5.0]


@pytest.mark.parametrize("norm_gradient", ["constant", "full"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_d7_zero_row(norm_gradient: str, *, jit: bool) -> None:
    """A row of zeros outputs its bias, and has gradient 0, finite, in everything."""
    x_TI, W_OI, adapter = layer(3, 4, 2)
    W_OI = W_OI.at[1].set(0)
    adapter = replace(adapter, lora_B=adapter.lora_B.at[1].set(0))
    bias_O = jnp.asarray([1.0, 2.0, 3.0])

    def forward(x_TI: Array, adapter: Adapter) -> Array:
        return dora.forward(x_TI, W_OI, adapter, scaling=S, bias_O=bias_O, norm_gradient=norm_gradient)

    y_TO, pull = jax.vjp(jax.jit(forward) if jit else forward, x_TI, adapter)
    dx_TI, gradient = pull(jnp.zeros_like(y_TO).at[:, 1].set(1))
    assert y_TO[:, 1].tolist() == [2.0] * 5
    assert [float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves((dx_TI, gradient))] == [0, 0, 0, 0]


def test_d7_zero_rows_are_counted() -> None:
    """The rows that will never train are those that hold nothing but zeros."""
    V_OK = jnp.asarray([[0.0, 0.0], [0.0, 1e-300], [1.0, -1.0]])

    assert dora.zero_rows(V_OK).tolist() == [True, False, False]


def test_d8_bias_is_not_scaled() -> None:
    """The bias reaches the output as it is, whatever the ratio."""
    x_TI, W_OI, adapter = layer(3, 4, 2)
    bias_O = jnp.asarray([1.0, 2.0, 3.0])

    y_TO = dora.forward(jnp.zeros_like(x_TI), W_OI, adapter, scaling=S, bias_O=bias_O)

    assert y_TO.tolist() == [[1.0, 2.0, 3.0]] * 5


def test_d9_dropout_by_hand() -> None:
    """The base product is whole, its share in c - 1 and the factors' product see what dropout left."""
    x_TI, W_OI = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 4.0]])
    adapter = Adapter(jnp.asarray([[0.0, 0.0]]), jnp.asarray([[1.0]]), jnp.asarray([10.0]))

    y_TO = dora.forward(x_TI, W_OI, adapter, scaling=1.0, mask_TI=jnp.asarray([[2.0, 0.0]]))

    assert y_TO.tolist() == [[11 + (2 - 1) * 6]]


def test_d9_neutral_at_start() -> None:
    """With B = 0 and c = 1 the output is the base layer's, to the bit, whatever is dropped."""
    x_TI, W_OI, adapter = untrained(3, 4, 2, dtype=jnp.float32)
    mask_TI = dora.dropout_mask(jax.random.key(0), x_TI.shape, rate=0.5, dtype=jnp.float32)

    assert dora.forward(x_TI, W_OI, adapter, scaling=S, mask_TI=mask_TI).tolist() == (x_TI @ W_OI.T).tolist()


def test_d9_a_zero_row_keeps_what_was_dropped() -> None:
    """Where n = 0 because s B A = -W, the base product of what dropout took away is left."""
    x_TI, W_OI = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 4.0]])
    adapter = Adapter(-W_OI, jnp.asarray([[1.0]]), jnp.asarray([7.0]))

    y_TO = dora.forward(x_TI, W_OI, adapter, scaling=1.0, mask_TI=jnp.asarray([[0.0, 1.0]]))

    assert y_TO.tolist() == [[3.0]]


def test_d9_mask_keeps_the_mean() -> None:
    """A mask holds nothing but 0 and 1 / (1 - p)."""
    mask = dora.dropout_mask(jax.random.key(0), (8, 8), rate=0.75, dtype=jnp.float32)

    assert set(mask.reshape(-1).tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_d9_refuses_a_rate(rate: float) -> None:
    """What is no probability, or drops everything, is refused."""
    with pytest.raises(InputError, match="rate"):
        dora.dropout_mask(jax.random.key(0), (2,), rate=rate, dtype=jnp.float32)


def test_d10_merged_weight_does_what_the_layer_does() -> None:
    """The merged weight gives the layer's output, within both routes' roundings."""
    x_TI, W_OI, adapter = layer(3, 4, 2)
    W_merged_OI = dora.merge(W_OI, adapter, scaling=S)

    error_TO = jnp.abs(x_TI @ W_merged_OI.T - dora.forward(x_TI, W_OI, adapter, scaling=S))

    sizes_OI = jnp.abs(W_OI) + S * jnp.abs(adapter.lora_B) @ jnp.abs(adapter.lora_A)
    c_O = dora.ratio(
        adapter.magnitude, dora.weight_norm(dora.direction(W_OI, adapter.lora_A, adapter.lora_B, scaling=S))
    )
    roundings = (4 + 2 + 4) + (4 + 2 + 4)  # each way: in + r products summed, and s, c, two additions
    bound_TO = roundings * jnp.finfo(jnp.float64).eps / 2 * (jnp.abs(x_TI) @ sizes_OI.T) * c_O[None, :]
    assert bool(jnp.all(error_TO <= bound_TO))


@DTYPES
def test_d10_merged_rows_have_the_magnitudes_as_norms(dtype: type) -> None:
    """The row norms of the merged weight are the magnitudes, within the roundings of a norm of four numbers, twice."""
    _, W_OI, adapter = layer(9, 4, 2, dtype=dtype)

    n_O = dora.weight_norm(dora.merge(W_OI, adapter, scaling=S))

    assert ulps(n_O, adapter.magnitude) <= 2 * (4 + 3)


def test_d11_adapter_stays_wide_under_a_narrow_compute_dtype() -> None:
    """With bf16 inputs and weights the ratio is still the float32 one: 1 to the bit at start."""
    x_TI, W_OI, _ = layer(33, 40, 2)
    x_TI, W_OI = x_TI.astype(jnp.bfloat16), W_OI.astype(jnp.bfloat16)
    A_RI, B_OR = gaussian(2, 40, dtype=jnp.float32), jnp.zeros((33, 2), jnp.float32)
    adapter = Adapter(A_RI, B_OR, dora.initial_magnitude(W_OI, A_RI, B_OR, scaling=S))

    y_TO = dora.forward(x_TI, W_OI, adapter, scaling=S)

    assert y_TO.dtype == jnp.bfloat16
    assert y_TO.tolist() == (x_TI @ W_OI.T).tolist()


def test_d11_ratio_is_float32_under_a_narrow_compute_dtype() -> None:
    """With bf16 inputs and weights the products are bf16 and the ratio on them is that of the float32 adapter."""
    x_TI, W_OI, _ = layer(33, 40, 2)
    x_TI, W_OI = x_TI.astype(jnp.bfloat16), W_OI.astype(jnp.bfloat16)
    m_O = 1 + jnp.abs(gaussian(33, dtype=jnp.float32))
    adapter = Adapter(gaussian(2, 40, dtype=jnp.float32), jnp.zeros((33, 2), jnp.float32), m_O)

    y_TO = dora.forward(x_TI, W_OI, adapter, scaling=S)

    c_O = m_O / dora.weight_norm(W_OI.astype(jnp.float32))
    assert y_TO.tolist() == (c_O[None, :] * (x_TI @ W_OI.T).astype(jnp.float32)).astype(jnp.bfloat16).tolist()


def test_d12_stored_norm_is_divided_by() -> None:
    """Jitted together, a root and a division by it give 1 where numerator and root are equal: no reciprocal root."""
    squares_O = jnp.square(gaussian(512, dtype=jnp.float32)) + 1

    c_O = jax.jit(lambda m_O, squares_O: m_O / dora._as_stored(jnp.sqrt(squares_O)))(jnp.sqrt(squares_O), squares_O)

    assert c_O.tolist() == [1.0] * 512


@DTYPES
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (65, 64), (33, 577)], ids=["1x1", "65x64", "33x577"])
def test_d12_neutral_start(dtype: type, out: int, width: int, *, jit: bool) -> None:
    """With B = 0 every ratio is exactly 1 and the output is the base layer's to the bit."""
    x_TI, W_OI, adapter = untrained(out, width, 2, dtype=dtype)

    def ratio(W_OI: Array, adapter: Adapter) -> Array:
        V_OI = dora.direction(W_OI, adapter.lora_A, adapter.lora_B, scaling=S)
        return dora.ratio(adapter.magnitude, dora.weight_norm(V_OI))

    c_O = (jax.jit(ratio) if jit else ratio)(W_OI, adapter)
    y_TO = dora.forward(x_TI, W_OI, adapter, scaling=S)
    assert c_O.tolist() == [1.0] * out
    assert y_TO.tolist() == (x_TI @ W_OI.T).tolist()


@DTYPES
@pytest.mark.parametrize("rest", [1.0, 1e-1, 1e-2, 1e-4, 0.0], ids=str)
def test_d13_factored_norm_under_cancellation(dtype: type, rest: float) -> None:
    """Rows of W near -s B A give the norm within the stated bound, and a row that cancels gives no NaN."""
    _, noise_OI, adapter = layer(32, 24, 2, dtype=dtype)
    A_RI, B_OR = adapter.lora_A, adapter.lora_B
    W_OI = rest * noise_OI - S * (B_OR @ A_RI)

    n_O = dora.factored_weight_norm(W_OI, A_RI, B_OR, scaling=S)

    wide = [array.astype(jnp.float64) for array in (W_OI, A_RI, B_OR)]
    exact_O = dora.weight_norm(dora.direction(*wide, scaling=S))
    unit = float(jnp.finfo(dtype).eps) / 2
    size_O = dora.weight_norm(wide[0]) + S * jnp.abs(wide[2]) @ dora.weight_norm(wide[1])
    factored_O = 2.0**dora.GUARD_BITS * (24 + 2 * 2 + 8) * unit / 2 * exact_O
    direct_O = (2 + 3) * unit * size_O + (24 + 3) * unit * exact_O
    assert bool(jnp.all(jnp.abs(n_O.astype(jnp.float64) - exact_O) <= jnp.maximum(factored_O, direct_O)))


@pytest.mark.parametrize("rest", [1e-3, 0.0], ids=str)
def test_d13_guarded_rows_are_computed_directly(rest: float) -> None:
    """A row that loses more than ten bits to cancellation gives the direct norm to the bit."""
    _, noise_OI, adapter = layer(32, 24, 2)
    W_OI = rest * noise_OI - S * (adapter.lora_B @ adapter.lora_A)

    factored_O = dora.factored_weight_norm(W_OI, adapter.lora_A, adapter.lora_B, scaling=S)

    direct_O = dora.weight_norm(dora.direction(W_OI, adapter.lora_A, adapter.lora_B, scaling=S))
    assert factored_O.tolist() == direct_O.tolist()


def test_d13_ordinary_rows_are_not_guarded() -> None:
    """The guard leaves rows alone where the update is as large as the weight, so that the fast form stays fast."""
    squares_O, size_O = jnp.asarray([1.0, 2.0**-9, 2.0**-11]), jnp.ones(3)

    guarded_O = dora.guarded_rows(squares_O, size_O, norm_R=jnp.ones(2), terms=4096)

    assert guarded_O.tolist() == [False, False, True]


def test_d13_long_rows_are_guarded_by_their_count_of_terms() -> None:
    """Beyond 2^12 terms a square must be four times the rigorous error of the sum, (terms + 8) u, not only ten bits."""
    error = (2**20 + 8) * float(jnp.finfo(jnp.float32).eps) / 2
    squares_O = jnp.asarray([3.9 * error, 4.1 * error], jnp.float32)

    guarded_O = dora.guarded_rows(squares_O, jnp.ones(2, jnp.float32), norm_R=jnp.ones(2, jnp.float32), terms=2**20)

    assert guarded_O.tolist() == [True, False]


def test_d13_counts_the_terms_of_its_own_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """In + 2 r products stand in sequence, whatever the numbers of rows."""
    counts = []
    right = dora.guarded_rows

    def counting(*arrays: Array, norm_R: Array, terms: int) -> Array:
        counts.append(terms)
        return right(*arrays, norm_R=norm_R, terms=terms)

    monkeypatch.setattr(dora, "guarded_rows", counting)
    _, W_OI, adapter = layer(32, 24, 2)

    dora.factored_weight_norm(W_OI, adapter.lora_A, adapter.lora_B, scaling=S)

    assert counts == [24 + 2 * 2]


@pytest.mark.parametrize(
    ("W", "A", "B"),
    [(1e-25, 0.0, 0.0), (1e25, 0.0, 0.0), (1.0, 1e-25, 1e25), (1.0, 1e25, 1e-25)],
    ids=["small weight", "large weight", "small A", "large A"],
)
def test_d13_factored_norm_outside_its_range(W: float, A: float, B: float) -> None:
    """Numbers whose squares leave float32 give the direct norm: neither 0 nor inf nor a lost term."""
    W_OI, A_RI, B_OR = (jnp.full(shape, size, jnp.float32) for shape, size in (((2, 4), W), ((1, 4), A), ((2, 1), B)))

    n_O = dora.factored_weight_norm(W_OI, A_RI, B_OR, scaling=S)

    assert n_O.tolist() == dora.weight_norm(dora.direction(W_OI, A_RI, B_OR, scaling=S)).tolist()


def test_d13_factored_norm_with_squares_partly_lost() -> None:
    """A row of which some squares underflow and others do not gives the direct norm, with no term missing."""
    W_OI = jnp.asarray([[1.2e-19, 1e-19, 1e-19, 1e-19]], jnp.float32)
    A_RI, B_OR = jnp.zeros((1, 4), jnp.float32), jnp.zeros((1, 1), jnp.float32)

    assert dora.factored_weight_norm(W_OI, A_RI, B_OR, scaling=S).tolist() == dora.weight_norm(W_OI).tolist()


def test_d3_no_rows_have_no_norms() -> None:
    """An empty shard has an empty norm: a rank without rows computes on."""
    assert dora.weight_norm(jnp.zeros((0, 3))).shape == (0,)
    assert dora.zero_rows(jnp.zeros((0, 3))).shape == (0,)
