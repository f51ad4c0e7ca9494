"""Clause D3 for every kind of layer: autodiff, closed form, peft and torch on the same numbers, in float64.

The numbers are a lattice: rows of V hold -1, 0 and 1 with 4^k of them not 0, so that norms are powers of two, and all
else is small integers and dyadic fractions. No route rounds anything, so any two must agree to the bit.
"""

import inspect
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from ref import dora, layers
from ref.layers import Window
from ref.types import Adapter, InputError

S = 0.5
FIELDS = ["lora_A", "lora_B", "magnitude", "x"]
of_fields = pytest.mark.parametrize("field", FIELDS)
of_norms = pytest.mark.parametrize("norm_gradient", ["constant", "full"])
of_dropout = pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropout"])


def integers(*shape, seed, size=2):
    """Fixed small integers."""
    return jnp.asarray(np.random.default_rng(seed).integers(-size, size + 1, size=shape).astype(np.float64))


def rows_of_norm(out, terms, *, seed):
    """Rows of -1, 0, 1 with the largest power of four of them not 0, which fits."""
    random, count = np.random.default_rng(seed), 4 ** int(np.log(terms) / np.log(4) + 1e-9)
    rows = np.zeros((out, terms))
    for row in rows:
        row[random.permutation(terms)[:count]] = random.choice([-1.0, 1.0], count)
    return jnp.asarray(rows)


@dataclass(frozen=True)
class Case:
    """A convolution with its input, cotangent, mask and bias."""

    x: Array
    W: Array
    adapter: Adapter
    G: Array
    mask: Array
    bias: Array
    window: Window


def magnitudes(out):
    """Dyadic, unlike one another."""
    return jnp.asarray([1.0, 2.0, 4.0] * out)[:out]


def case(window, *, size=6, channels=4, out=6, rank=2):
    """A lattice for a convolution of as many dimensions as the window has."""
    dims, groups = len(window.stride), window.groups
    kernel = (3, 2, 1)[:dims]
    A = integers(groups * rank, channels // groups, *kernel, seed=2)
    B = integers(out, rank, *(1,) * dims, seed=3)
    V = rows_of_norm(out, A[0].size, seed=1).reshape(out, *A.shape[1:])
    W = V - layers.direction(jnp.zeros_like(V), A, B, scaling=S, groups=groups)
    x = integers(2, channels, *(size,) * dims, seed=4)
    G = integers(*jax.eval_shape(lambda x: layers._convolve(x, W, window), x).shape, seed=5)
    mask = jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 == 0, 0.0, 2.0)
    return Case(x, W, Adapter(A, B, magnitudes(out)), G, mask, integers(out, seed=6), window)


WINDOWS = {
    "1d": Window((1,), (0,), (1,)),
    "1d strided": Window((2,), (1,), (1,)),
    "2d": Window((1, 1), (0, 0), (1, 1)),
    "2d strided": Window((2, 3), (1, 0), (1, 1)),
    "3d": Window((1, 2, 1), (1, 0, 0), (1, 1, 1)),
    "1d dilated": Window((1,), (2,), (2,)),
    "2d dilated groups": Window((2, 1), (1, 1), (2, 1), groups=2),
    "3d groups": Window((1, 1, 2), (0, 1, 0), (1, 2, 1), groups=2),
    "depthwise": Window((1, 1), (1, 1), (1, 1), groups=4),
}
CASES = {name: case(window, out=8 if window.groups == 4 else 6) for name, window in WINDOWS.items()}
of_cases = pytest.mark.parametrize("name", CASES)
VARIANTS = [
    *((name, False, "constant") for name in CASES),
    *(("1d strided", *variant) for variant in ((True, "constant"), (True, "full"), (False, "full"))),
    *(("2d dilated groups", *variant) for variant in ((True, "constant"), (True, "full"), (False, "full"))),
]
"""Every window as it is, and two of them with dropout and through the norm."""
of_peft_cases = pytest.mark.parametrize("name", ["1d", "1d strided", "2d", "2d strided", "3d"])


def assert_equal(got, want):
    """Every number, and the shape."""
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def autodiff(it, *, dropout=False, norm_gradient="constant"):
    """What JAX makes of the forward, by field."""
    options = {"window": it.window, "scaling": S, "mask_NI": it.mask if dropout else None}

    def loss(x, adapter):
        return jnp.sum(it.G * layers.convolution(x, it.W, adapter, norm_gradient=norm_gradient, **options))

    dx, found = jax.jit(jax.grad(loss, argnums=(0, 1)))(it.x, it.adapter)
    return {"lora_A": found.lora_A, "lora_B": found.lora_B, "magnitude": found.magnitude, "x": dx}


def tensor(array):
    """The same numbers in torch, ready to get a gradient."""
    return torch.from_numpy(np.array(array)).requires_grad_()


def conv_fn(it):
    """Torch's function of as many dimensions."""
    return getattr(torch.nn.functional, f"conv{it.x.ndim - 2}d")


def torch_window(it):
    """Torch's words for where the kernel goes."""
    return {name: getattr(it.window, name) for name in ("stride", "padding", "dilation", "groups")}


# --- convolutions --------------------------------------------------------------------------------------------------


@of_cases
def test_d3_convolution_is_that_of_the_merged_weight(name):
    """The output is torch's convolution with c V, for any stride, padding, dilation and groups."""
    it = CASES[name]
    V = layers.direction(it.W, it.adapter.lora_A, it.adapter.lora_B, scaling=S, groups=it.window.groups)
    c = it.adapter.magnitude / dora.weight_norm(V)
    merged = c.reshape(-1, *(1,) * (V.ndim - 1)) * V

    got = layers.convolution(it.x, it.W, it.adapter, window=it.window, scaling=S, bias_O=it.bias)

    assert_equal(got, conv_fn(it)(*map(tensor, (it.x, merged, it.bias)), **torch_window(it)).detach())


@of_cases
def test_d3_convolution_gradients_are_torchs(name):
    """So are the gradients, with torch differentiating m / n (W + s B A) at a constant n."""
    it = CASES[name]
    x, A, B, m = leaves = [tensor(a) for a in (it.x, it.adapter.lora_A, it.adapter.lora_B, it.adapter.magnitude)]
    groups, (out, rank) = it.window.groups, it.adapter.lora_B.shape[:2]
    BA = torch.bmm(B.reshape(groups, out // groups, rank), A.reshape(groups, rank, -1)).reshape(it.W.shape)
    V = torch.from_numpy(np.array(it.W)) + S * BA
    n = V.detach().reshape(out, -1).norm(dim=1)

    weight = (m / n).reshape(-1, *(1,) * (V.ndim - 1)) * V
    (conv_fn(it)(x, weight, **torch_window(it)) * torch.from_numpy(np.array(it.G))).sum().backward()

    found = autodiff(it)
    for field, leaf in zip(["x", *FIELDS[:3]], leaves, strict=True):
        assert_equal(found[field], leaf.grad)


@pytest.mark.parametrize(("name", "dropout", "norm_gradient"), VARIANTS)
def test_d3_closed_form_is_autodiffs(name, dropout, norm_gradient):
    """The closed form, of patches by groups, is the derivative of the convolution, both ways of the norm."""
    it = CASES[name]
    found = autodiff(it, dropout=dropout, norm_gradient=norm_gradient)

    closed = layers.convolution_closed_form(
        it.x,
        it.W,
        it.adapter,
        G_NO=it.G,
        window=it.window,
        scaling=S,
        mask_NI=it.mask if dropout else None,
        norm_gradient=norm_gradient,
    )

    for field in FIELDS:
        assert_equal(getattr(closed, field), found[field])


def peft_layer(module, adapter, *, targets="0", names=("lora_A", "lora_B")):
    """Peft's DoRA around one layer, in float64, with our factors and magnitude."""
    rank = adapter.lora_B.shape[1]
    config = LoraConfig(r=rank, lora_alpha=S * rank, target_modules=[targets], use_dora=True, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(torch.nn.Sequential(module), config).double()
    inner = model.base_model.model[0]
    factors = [getattr(inner, name)["default"] for name in names]
    factors = [getattr(factor, "weight", factor) for factor in factors]
    parameters = [*factors, inner.lora_magnitude_vector["default"].weight]
    for parameter, array in zip(parameters, jax.tree.leaves(adapter), strict=True):
        parameter.data = torch.from_numpy(np.array(array)).reshape(parameter.shape)
    return model, parameters


@of_peft_cases
def test_d3_convolution_is_pefts(name):
    """Output and gradients are peft's, at groups 1 and dilation 1, where it has the same function."""
    it = CASES[name]
    kind = getattr(torch.nn, f"Conv{it.x.ndim - 2}d")
    module = kind(it.W.shape[1], it.W.shape[0], it.W.shape[2:], stride=it.window.stride, padding=it.window.padding)
    module.weight.data, module.bias.data = (torch.from_numpy(np.array(a)) for a in (it.W, it.bias))
    model, parameters = peft_layer(module, it.adapter)
    x = tensor(it.x)

    y = model(x)
    (y * torch.from_numpy(np.array(it.G))).sum().backward()

    got = layers.convolution(it.x, it.W, it.adapter, window=it.window, scaling=S, bias_O=it.bias)
    found = autodiff(it)
    assert_equal(got, y.detach())
    for field, leaf in zip(FIELDS, [*parameters, x], strict=True):
        assert_equal(found[field], leaf.grad.reshape(found[field].shape))


@of_dropout
def test_d9_convolution_by_hand(dropout):
    """With a kernel of one number the convolution is the linear layer at every place, dropout included."""
    x, W = integers(1, 3, 5, seed=1), integers(2, 3, seed=2)
    adapter = Adapter(integers(1, 3, seed=3), integers(2, 1, seed=4), magnitudes(2))
    mask = jnp.where(x > 0, 2.0, 0.0) if dropout else None
    cut = Adapter(adapter.lora_A[:, :, None], adapter.lora_B[:, :, None], adapter.magnitude)

    got = layers.convolution(x, W[:, :, None], cut, window=WINDOWS["1d"], scaling=S, mask_NI=mask)

    mask_TI = None if mask is None else mask[0].T
    want = dora.forward(x[0].T, W, adapter, scaling=S, mask_TI=mask_TI)
    np.testing.assert_allclose(got[0].T, want, rtol=16 * 2.0**-53, atol=0)  # c alone is rounded: a few roundings


def test_d3_unfolded_input_times_rows_is_the_convolution():
    """A layer of any kind is a linear layer of its unfolded input."""
    it = CASES["2d dilated groups"]

    P_GTK = layers.unfold(it.x, kernel=it.W.shape[2:], window=it.window)
    y_GTO = P_GTK @ it.W.reshape(2, 3, -1).swapaxes(1, 2)

    want = layers._convolve(it.x, it.W, it.window)
    assert_equal(jnp.moveaxis(y_GTO.swapaxes(0, 1).reshape(2, *want.shape[2:], 6), -1, 1), want)


# --- embeddings, fan_in_fan_out ------------------------------------------------------------------------------------


IDS = jnp.asarray([3, 1, 0, 3, 5, 1])
TABLE_A, TABLE_B = integers(2, 16, seed=2), integers(5, 2, seed=3)
TABLE_W = (rows_of_norm(5, 16, seed=1) - S * TABLE_B @ TABLE_A).T
TABLE = Adapter(TABLE_A, TABLE_B, magnitudes(5))
TABLE_G = integers(6, 5, seed=7)
of_padding = pytest.mark.parametrize("padding_idx", [None, 1], ids=["no padding", "padding"])


def table_autodiff(**options):
    """The derivative of the embedding by its adapter."""
    return jax.grad(lambda a: jnp.sum(TABLE_G * layers.embedding(IDS, TABLE_W, a, scaling=S, **options)))(TABLE)


def test_d3_embedding_has_a_magnitude_per_feature():
    """The output is the rows of the merged table, whose norm runs over the vocabulary."""
    merged = dora.merge(TABLE_W.T, TABLE, scaling=S).T

    assert_equal(layers.embedding(IDS, TABLE_W, TABLE, scaling=S), merged[IDS])


@of_norms
@of_padding
def test_d3_embedding_closed_form_is_autodiffs(norm_gradient, padding_idx):
    """The linear layer's closed form of one-hot rows is the derivative of the look-up."""
    options = {"norm_gradient": norm_gradient, "padding_idx": padding_idx}

    closed = layers.embedding_closed_form(IDS, TABLE_W, TABLE, G_TD=TABLE_G, scaling=S, **options)

    found = table_autodiff(**options)
    for got, want in zip(jax.tree.leaves(closed), jax.tree.leaves(found), strict=True):
        assert_equal(got, want)


@of_padding
def test_d3_embedding_is_pefts(padding_idx):
    """Output and gradients are peft's; the padding token's column of A gets none."""
    module = torch.nn.Embedding(16, 5, padding_idx=padding_idx)
    module.weight.data = torch.from_numpy(np.array(TABLE_W))
    model, parameters = peft_layer(module, TABLE, names=("lora_embedding_A", "lora_embedding_B"))

    y = model(torch.from_numpy(np.array(IDS)))
    (y * torch.from_numpy(np.array(TABLE_G))).sum().backward()

    assert_equal(layers.embedding(IDS, TABLE_W, TABLE, scaling=S), y.detach())
    for got, leaf in zip(jax.tree.leaves(table_autodiff(padding_idx=padding_idx)), parameters, strict=True):
        assert_equal(got, leaf.grad.reshape(got.shape))


def test_d3_fan_in_fan_out_is_pefts():
    """A GPT-2 layer is the linear layer of its transposed weight, as peft has it."""
    A, B = integers(2, 16, seed=2), integers(6, 2, seed=3)
    W_IO = (rows_of_norm(6, 16, seed=1) - S * B @ A).T
    adapter, x, bias = Adapter(A, B, magnitudes(6)), integers(3, 16, seed=4), integers(6, seed=5)
    module = Conv1D(6, 16)
    module.weight.data, module.bias.data = torch.from_numpy(np.array(W_IO)), torch.from_numpy(np.array(bias))
    model, _ = peft_layer(module, adapter)

    got = dora.forward(x, layers.stored_transposed(W_IO), adapter, scaling=S, bias_O=bias)

    assert_equal(got, model(tensor(x)).detach())


# --- factors at start, refusals ------------------------------------------------------------------------------------


def test_d12_initial_factors_are_distributed_as_pefts():
    """A fills, and does not leave, the interval that peft draws from; B is zero."""
    lora_A, lora_B = layers.initial_factors(jax.random.key(0), (6, 4, 3), rank=64, groups=2)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(64, 4, 3), a=5**0.5)

    assert lora_A.shape == (128, 4, 3)
    assert not lora_B.any()
    assert lora_B.shape == (6, 64, 1)
    limit = float(np.nextafter(np.float32(12**-0.5), np.float32(1)))
    assert 0.99 * limit < float(jnp.abs(lora_A).max()) <= limit
    assert 0.95 * limit < float(theirs.abs().max()) <= limit


def test_d12_one_group_is_what_is_meant_where_none_is_named():
    """The factors of a linear layer or of an ungrouped convolution have R rows and R columns."""
    lora_A, lora_B = layers.initial_factors(jax.random.key(0), (6, 4), rank=2)

    assert (lora_A.shape, lora_B.shape) == ((2, 4), (6, 2))


def test_d12_initial_embedding_factors():
    """An embedding's A is zero and its B normal: the other way round."""
    lora_A, lora_B = layers.initial_embedding_factors(jax.random.key(0), (9, 5), rank=2)

    assert not lora_A.any()
    assert lora_B.shape == (5, 2)
    assert bool(lora_B.all())


@pytest.mark.parametrize("wrong", ["lora_A", "lora_B", "magnitude", "groups", "window", "channels"])
def test_what_does_not_fit_is_named(wrong):
    """Shapes that do not belong together are said to, with what came and what was wanted."""
    it = CASES["1d"]
    parts = dict(zip(FIELDS, jax.tree.leaves(it.adapter), strict=False))
    parts = {name: part[:-1] if name == wrong else part for name, part in parts.items()}
    window = {"groups": Window((1,), (0,), (1,), groups=4), "window": WINDOWS["2d"]}.get(wrong, it.window)
    x = it.x[:, :-1] if wrong == "channels" else it.x

    with pytest.raises(InputError, match=r"wanted|divide|spatial|channels"):
        layers.convolution(x, it.W, Adapter(**parts), window=window, scaling=S)


def test_d5_an_unknown_norm_gradient_is_refused():
    """A misspelt `norm_gradient` is taken for one of the two."""
    unchecked = inspect.unwrap(layers._ratio)  # as a user has it, without the tests' check of types

    with pytest.raises(InputError, match="norm_gradient 'frozen' is unknown"):
        unchecked(jnp.ones((2, 4)), jnp.ones(2), "frozen")
