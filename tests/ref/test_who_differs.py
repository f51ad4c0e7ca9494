"""What SPEC.md says of peft under `Differs`, by running peft's own layers beside the reference.

A test states what peft does *instead*, as an equation that its result satisfies, and that this is not the clause. When
peft changes, a test here fails: then SPEC.md is to be corrected, and nothing of ours is wrong.
"""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ref import dora, gradients, layers
from ref.layers import Window
from ref.types import Adapter

S = 0.5
RANK = 2
FEW = 64 * 2.0**-53
"""Relative to the largest number of a result in float64: some sixty roundings."""


def normal(*shape, seed, dtype=torch.float64):
    """Fixed Gaussian numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def array(tensor):
    """The same numbers for JAX."""
    return jnp.asarray(tensor.detach().numpy())


def wrapped(module, *, widened=True, **options):
    """The module in peft's DoRA, ready to train: the model, and its one adapted layer."""
    config = LoraConfig(r=RANK, lora_alpha=S * RANK, target_modules=["0"], use_dora=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of groups and of fan_in_fan_out
        model = get_peft_model(nn.Sequential(module), config, autocast_adapter_dtype=widened).train()
    return model, model.base_model.model[0]


def linear(W, *, b=None):
    """A plain layer of these numbers."""
    module = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=W.dtype)
    module.weight.data = W.clone()
    if b is not None:
        module.bias.data = b.clone()
    return module


def given(layer, *, A, B, m):
    """Puts these numbers into peft's linear layer or convolution."""
    layer.lora_A["default"].weight.data = A.clone()
    layer.lora_B["default"].weight.data = B.clone()
    layer.lora_magnitude_vector["default"].weight.data = m.clone()


def magnitude(layer):
    """Its magnitude, as a vector."""
    return layer.lora_magnitude_vector["default"].weight.detach().reshape(-1)


def zeros(W, *, dtype=None):
    """Factors of the reference as they are at start, for the norm of W alone."""
    W = array(W) if dtype is None else array(W.to(dtype))
    return W, jnp.zeros((RANK, W.shape[1]), W.dtype), jnp.zeros((W.shape[0], RANK), W.dtype)


def assert_close(got, want, *, within=FEW):
    """Nowhere further apart than so much of the largest number."""
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=within * np.max(np.abs(want)))


def far(got, want):
    """How far apart, of the whole."""
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# --- the linear layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "norm"), [(1e-25, 0.0), (1e20, np.inf)], ids=["tiny", "huge"])
def test_d4_pefts_norm_underflows_and_overflows(size, norm):
    """Peft's float32 norm of a row at 1e-25 is 0, at 1e20 infinite, and the row NaN; the reference's is right."""
    W = normal(3, 8, seed=1, dtype=torch.float32)
    W[1] *= size
    model, layer = wrapped(linear(W))

    y = model(normal(4, 8, seed=2, dtype=torch.float32))

    n = dora.weight_norm(array(W))
    assert magnitude(layer)[1] == norm
    assert y[:, 1].isnan().all()
    np.testing.assert_allclose(n, torch.linalg.vector_norm(W.double(), dim=1), rtol=16 * 2.0**-24)


def test_d4_pefts_norm_has_the_adapters_dtype():
    """Where peft is told not to widen the adapter, its norm is bfloat16; the reference's is float32 at least."""
    W = normal(16, 32, seed=1).bfloat16()
    _, layer = wrapped(linear(W), widened=False)
    n = layer.lora_magnitude_vector["default"].get_weight_norm(layer.weight, torch.zeros_like(W), S)

    want = dora.weight_norm(array(W.float()).astype(jnp.bfloat16))
    assert n.dtype == magnitude(layer).dtype == torch.bfloat16
    assert want.dtype == jnp.float32
    assert far(n.float(), want) > 2.0**-12


def gradients_of_peft():
    """A, B and m of a Gaussian layer in float64, by peft; and its numbers for the reference."""
    W, A, B, m = normal(6, 8, seed=1), normal(RANK, 8, seed=2), normal(6, RANK, seed=3), normal(6, seed=4).abs() + 0.5
    x, G = normal(5, 8, seed=5), normal(5, 6, seed=6)
    model, layer = wrapped(linear(W))
    model.double()
    given(layer, A=A, B=B, m=m)
    (model(x) * G).sum().backward()
    found = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    inputs = (array(x), array(W), Adapter(array(A), array(B), array(m)))
    return found, lambda way: gradients.closed_form(*inputs, G_TO=array(G), scaling=S, norm_gradient=way)


def test_d5_peft_holds_the_norm_constant():
    """Peft agrees here: its gradients are those of a constant norm, and far from the full ones."""
    found, closed = gradients_of_peft()

    constant, full = closed("constant"), closed("full")

    for got, name in zip(found, ("lora_A", "lora_B"), strict=True):
        assert_close(got, getattr(constant, name))
        assert far(got, getattr(full, name)) > 0.01


def test_d6_pefts_magnitude_is_rounded_to_the_weights_dtype():
    """On a bfloat16 base peft's magnitude is the reference's, rounded to bfloat16 and held in float32."""
    W = normal(64, 48, seed=1).bfloat16()
    _, layer = wrapped(linear(W))

    m = torch.from_numpy(np.array(dora.initial_magnitude(*zeros(W, dtype=torch.float32), scaling=S)))

    assert magnitude(layer).dtype == torch.float32
    assert torch.equal(magnitude(layer), m.bfloat16().float())
    assert not torch.equal(magnitude(layer), m)


def test_d7_pefts_zero_row_is_nan():
    """Peft's 0 / 0 is NaN in the row's output, its magnitude and B, and in all of A and x; the reference has zeros."""
    W = normal(3, 8, seed=1)
    W[1] = 0
    model, layer = wrapped(linear(W))
    model.double()
    x = normal(4, 8, seed=2).requires_grad_()

    y = model(x)
    y.sum().backward()

    trained = (layer.lora_magnitude_vector["default"], layer.lora_B["default"], layer.lora_A["default"])
    dm, dB, dA = (of.weight.grad for of in trained)
    assert [t.isnan().any().item() for t in (y[:, 1], dm[1], dB[1])] == [True, True, True]
    assert [t.isnan().all().item() for t in (dA, x.grad)] == [True, True]
    assert not torch.cat([y[:, [0, 2]].flatten(), dm[[0, 2]], dB[[0, 2]].flatten()]).isnan().any()
    A = array(layer.lora_A["default"].weight)
    ours = Adapter(A, jnp.zeros((3, RANK)), jnp.ones(3))
    found = gradients.closed_form(array(x), array(W), ours, G_TO=jnp.ones((4, 3)), scaling=S)
    assert all(np.isfinite(leaf).all() for leaf in (found.lora_A, found.lora_B, found.magnitude, found.x))


def test_d8_peft_takes_the_bias_off_a_rounded_sum():
    """Peft has y0 as (x W' + b) - b: where b is 2^24, a product of 0.25 is lost, and the magnitude gets no gradient."""
    W, x, b = torch.ones(1, 1), torch.full((1, 1), 0.25), torch.full((1,), 2.0**24)
    model, layer = wrapped(linear(W, b=b))

    model(x).sum().backward()

    A = array(layer.lora_A["default"].weight)
    ours = Adapter(A, jnp.zeros((1, RANK), jnp.float32), jnp.ones(1, jnp.float32))
    found = gradients.closed_form(array(x), array(W), ours, G_TO=jnp.ones((1, 1), jnp.float32), scaling=S)
    assert layer.lora_magnitude_vector["default"].weight.grad.item() == 0
    assert found.magnitude.item() == 0.25


def test_d10_peft_unmerges_by_arithmetic():
    """Merged and unmerged, peft's weight is a neighbour of what it was; the reference says to keep the bits aside."""
    W, m = normal(16, 32, seed=1, dtype=torch.float32), normal(16, seed=4, dtype=torch.float32).abs() + 0.5
    _, layer = wrapped(linear(W))
    given(layer, A=normal(RANK, 32, seed=2).float(), B=normal(16, RANK, seed=3).float(), m=m)

    layer.merge()
    layer.unmerge()

    assert 0 < far(layer.weight, W) < 16 * 2.0**-24


def test_d10_pefts_merge_of_a_magnitude_of_zero_cannot_be_undone():
    """A row whose magnitude is 0 comes back as NaN."""
    _, layer = wrapped(linear(normal(3, 8, seed=1, dtype=torch.float32)))
    layer.lora_magnitude_vector["default"].weight.data[1] = 0

    layer.merge()
    layer.unmerge()

    assert layer.weight[1].isnan().all()


def test_d10_peft_unmerges_a_transposed_layer_in_its_orientation():
    """Peft agrees here since peft#3532: a square GPT-2 layer comes back as itself, but for roundings."""
    module = Conv1D(8, 8)
    module.weight.data = normal(8, 8, seed=1)
    _, layer = wrapped(module, fan_in_fan_out=True)
    layer.double()
    layer.lora_B["default"].weight.data = normal(8, RANK, seed=3)
    layer.lora_magnitude_vector["default"].weight.data = normal(8, seed=4).abs() + 0.5

    layer.merge()
    merged = layer.weight.clone()
    layer.unmerge()

    assert far(merged, normal(8, 8, seed=1)) > 0.1
    assert far(layer.weight, normal(8, 8, seed=1)) < FEW


def test_d10_pefts_merged_weight_has_the_bases_dtype():
    """Merged into bfloat16, peft's weight is the reference's float32 one with bfloat16's error."""
    W, A, B = normal(16, 32, seed=1).bfloat16(), normal(RANK, 32, seed=2).float(), normal(16, RANK, seed=3).float()
    _, layer = wrapped(linear(W))
    m = magnitude(layer).clone()
    given(layer, A=A, B=B, m=m)

    layer.merge()

    want = dora.merge(array(W.float()), Adapter(array(A), array(B), array(m)), scaling=S)
    assert layer.weight.dtype == torch.bfloat16
    assert want.dtype == jnp.float32
    assert 2.0**-12 < far(layer.weight.float(), want) < 2.0**-7


def test_d11_pefts_ratio_on_a_bfloat16_base_is_off_at_start():
    """|c - 1| exceeds 3e-3 with peft's magnitude; with the reference's every ratio is 1."""
    W = normal(512, 64, seed=1).bfloat16()
    _, layer = wrapped(linear(W))

    n = dora.weight_norm(array(W.float()))

    c = dora.ratio(array(magnitude(layer)), n)
    assert 3e-3 < np.max(np.abs(c - 1)) < 2.0**-8
    assert (dora.ratio(dora.initial_magnitude(*zeros(W, dtype=torch.float32), scaling=S), n) == 1).all()


@pytest.mark.parametrize(("dtype", "neutral"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_d12_peft_on_a_bfloat16_base_is_not_neutral(dtype, neutral):
    """Peft starts from the base layer's output on a float32 base, and not on a bfloat16 one."""
    W, x = normal(64, 32, seed=1).to(dtype), normal(8, 32, seed=2).to(dtype)
    model, _ = wrapped(linear(W))

    y = model(x)

    assert torch.equal(y, functional.linear(x, W)) == neutral


# --- convolutions and embeddings -----------------------------------------------------------------------------------


def convolution(*, out=4, **options):
    """A two-dimensional convolution over four channels, its factors drawn, in peft and as it was."""
    module = nn.Conv2d(4, out, 3, bias=False, dtype=torch.float64, **options)
    module.weight.data = normal(*module.weight.shape, seed=1)
    model, layer = wrapped(module)
    model.double()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    m = (normal(out, seed=4).abs() + 0.5).reshape(layer.lora_magnitude_vector["default"].weight.shape)
    given(layer, A=normal(*A.weight.shape, seed=2), B=normal(*B.weight.shape, seed=3), m=m)
    return model, layer


def composed(layer, x, *, delta):
    """Peft's sum, c (x * W + s delta), with c from the norm of W + s B A as peft multiplies it out."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    V = layer.weight + S * (B.reshape(-1, RANK) @ A.reshape(RANK, -1)).reshape(layer.weight.shape)
    c = magnitude(layer) / V.flatten(1).norm(dim=1)
    return c[:, None, None] * (layer.base_layer(x) + S * delta)


def test_d3_pefts_groups_read_all_channels():
    """At groups 2 peft's adapter reads every channel, and its norm is another matrix's; ours reads its own group's."""
    model, layer = convolution(groups=2)
    x = normal(1, 4, 5, 5, seed=5).requires_grad_()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = functional.conv2d(functional.conv2d(x, A), B, groups=2)

    y = model(x)
    (dx,) = torch.autograd.grad(y[:, :2].sum(), x)

    assert A.shape[1] == 4  # the weight's own rows have two channels
    assert_close(y, composed(layer, x, delta=delta))
    assert dx[:, 2:].abs().max() > 0.1
    window = Window((1, 1), (0, 0), (1, 1), groups=2)
    ours = Adapter(jnp.ones((2 * RANK, 2, 3, 3)), jnp.ones((4, RANK, 1, 1)), jnp.ones(4))
    first = layers.convolution(array(x), array(layer.weight), ours, window=window, scaling=S)
    moved = layers.convolution(array(x).at[:, 2:].add(1), array(layer.weight), ours, window=window, scaling=S)
    np.testing.assert_array_equal(first[:, :2], moved[:, :2])


def test_d3_peft_raises_at_dilation_2():
    """Its A is not dilated, so that what it gives has another size."""
    model, _ = convolution(dilation=2)

    with pytest.raises(RuntimeError, match="size of tensor"):
        model(normal(1, 4, 7, 7, seed=5))


def test_d3_pefts_factor_is_not_dilated_where_sizes_fit():
    """With padding="same" nothing raises at dilation 2: peft's A reads neighbours, the weight every other number."""
    model, layer = convolution(dilation=2, padding="same")
    x = normal(1, 4, 7, 7, seed=5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    near = functional.conv2d(functional.conv2d(x, A, padding="same"), B)
    ours = Adapter(array(A), array(B), array(magnitude(layer)))
    window = Window((1, 1), (2, 2), (2, 2))

    y = model(x)

    assert_close(y, composed(layer, x, delta=near))
    assert far(y, layers.convolution(array(x), array(layer.weight), ours, window=window, scaling=S)) > 0.1


def test_d3_pefts_factor_pads_zeros_whatever_the_padding_mode():
    """Where the weight reads a reflection, peft's A reads zeros."""
    model, layer = convolution(padding=1, padding_mode="reflect")
    x = normal(1, 4, 5, 5, seed=5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours = Adapter(array(A), array(B), array(magnitude(layer)))
    reflected = functional.pad(x, (1, 1, 1, 1), mode="reflect")

    y = model(x)

    assert_close(y, composed(layer, x, delta=functional.conv2d(functional.conv2d(x, A, padding=1), B)))
    window = Window((1, 1), (0, 0), (1, 1))
    assert far(y, layers.convolution(array(reflected), array(layer.weight), ours, window=window, scaling=S)) > 0.1


def test_d3_pefts_embedding_has_a_magnitude_per_feature():
    """Peft agrees here: as many magnitudes as features, each the norm over the vocabulary."""
    module = nn.Embedding(7, 5)
    _, layer = wrapped(module)

    m = dora.weight_norm(array(module.weight.double().T))

    assert_close(magnitude(layer), m, within=16 * 2.0**-24)


def test_d9_pefts_embedding_drops_nothing():
    """Dropout is accepted for an embedding and without effect, while a linear layer's output moves."""
    ids, x = torch.arange(7), normal(7, 7, seed=1, dtype=torch.float32)
    embedding, table = wrapped(nn.Embedding(7, 5), lora_dropout=0.5, init_lora_weights=False)
    other, _ = wrapped(linear(normal(5, 7, seed=2, dtype=torch.float32)), lora_dropout=0.5, init_lora_weights=False)

    first, second = embedding(ids), embedding(ids)

    assert table.lora_dropout["default"].p == 0.5
    assert torch.equal(first, second)
    assert not torch.equal(other(x), other(x))
