"""D9: dropout in a linear layer: against `ref` and peft under the same mask, its generator, and when it is off."""

import pytest
import torch
from judges import peft, ref_linear
from reference import Inputs, gaussian, lattice, layer_of, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_impl import DoraConfig, QuantConfig, apply_dora
from torch_impl.errors import OptionError
from torch_impl.layers.rule import RuleProduct

RATE = 0.5  # the mask holds 2 where it keeps, so that a lattice stays one
of_tensors = pytest.mark.parametrize("tensor", ["y", "A", "B", "m", "x"])


def kept(inputs: Inputs, *, rate: float = RATE) -> Tensor:
    """Fixed numbers of x to keep."""
    return torch.rand(inputs.x.shape, generator=torch.Generator().manual_seed(7)) >= rate


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@of_tensors
def test_d9_lattice_gradients_equal_refs_to_the_bit(tensor: str, *, bias: bool) -> None:
    """On exactly representable inputs the layer and the float64 reference give equal values under one mask."""
    inputs = lattice(65, 48, 3, bias=bias)
    keep = kept(inputs)

    got = run(layer_of(inputs, dropout=RATE), inputs.x, inputs.G, keep=keep)[tensor]

    want = ref_linear(inputs, mask=keep.double() / (1 - RATE))[tensor]
    assert torch.equal(got.double(), want)
    assert torch.count_nonzero(want) > want.numel() / 4
    assert not torch.equal(want, ref_linear(inputs)[tensor])


@of_tensors
def test_d9_lattice_gradients_equal_pefts_to_the_bit(tensor: str) -> None:
    """So does peft in float64 when it is given the mask."""
    inputs = lattice(65, 48, 3, bias=True)
    keep = kept(inputs)

    got = run(layer_of(inputs, dropout=RATE), inputs.x, inputs.G, keep=keep)[tensor]

    assert torch.equal(got.double(), peft(nn.Linear(48, 65), inputs, mask=keep / (1 - RATE))[tensor])


@pytest.mark.parametrize("rate", [0.1, 0.9])
@of_tensors
def test_d9_gaussian_gradients_agree_with_refs(tensor: str, rate: float) -> None:
    """On ordinary numbers the 2-norm of the error is some roundings of the result (three sums of 576 terms)."""
    inputs = gaussian(96, 576, 8)
    keep = kept(inputs, rate=rate)

    got = run(layer_of(inputs, dropout=rate), inputs.x, inputs.G, keep=keep)[tensor].double()

    want = ref_linear(inputs, mask=keep.double() / (1 - rate))[tensor]
    assert float((got - want).norm() / want.norm()) <= 8 * (3 * 576) ** 0.5 * 2.0**-24


@of_tensors
def test_d9_zero_rows_keep_what_the_mask_took(tensor: str) -> None:
    """Where V's row is 0 and c is 0, y is ((x - u) W')_i and the bias, and no gradient is NaN."""
    inputs = lattice(64, 48, 4, bias=True)
    inputs.W[5] = -2.0 * (inputs.B[5] @ inputs.A)
    keep = kept(inputs)

    got = run(layer_of(inputs, dropout=RATE), inputs.x, inputs.G, keep=keep)

    assert torch.equal(got[tensor].double(), ref_linear(inputs, mask=keep / (1 - RATE))[tensor])
    assert not got["m"][5]
    assert got["y"][:, 5].ne(inputs.b[5]).any()


@pytest.mark.parametrize("tensor", ["y", "A", "B", "x"])
def test_d9_lora_drops_the_factors_input_alone(tensor: str) -> None:
    """With method lora y = x W' + s (u A') B' + b, as autograd differentiates it in float64."""
    it = lattice(65, 48, 3, bias=True)
    keep = kept(it)
    A, B, x = (t.double().requires_grad_() for t in (it.A, it.B, it.x))
    y = x @ it.W.double().T + it.scaling * ((x * keep / (1 - RATE)) @ A.T) @ B.T + it.b.double()
    y.backward(it.G.double())

    got = run(layer_of(it, dropout=RATE, method="lora"), it.x, it.G, keep=keep)[tensor]

    assert torch.equal(got.double(), {"y": y.detach(), "A": A.grad, "B": B.grad, "x": x.grad}[tensor])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_d9_the_generator_keeps_what_torchs_dropout_keeps(dtype: torch.dtype) -> None:
    """While training the mask comes from the default generator, as nn.Dropout draws it at the same seed."""
    inputs = gaussian(16, 24, 2)
    layer, x = layer_of(inputs, dropout=0.3, compute_dtype=dtype), inputs.x.to(dtype)
    torch.manual_seed(3)
    keep = nn.Dropout(0.3)(torch.ones_like(x)) != 0
    want = layer(x, keep)

    torch.manual_seed(3)
    got = layer(x)

    assert torch.equal(got, want)
    assert 0 < int(keep.sum()) < keep.numel()
    assert not torch.equal(layer(x), want)


@pytest.mark.parametrize("off", ["eval", "rate-0"])
@of_tensors
def test_d9_off_changes_no_bit_and_draws_nothing(tensor: str, off: str) -> None:
    """In evaluation, and at rate 0, the layer is the one without dropout, and the generator stands where it stood."""
    inputs = gaussian(33, 40, 3)
    layer = layer_of(inputs, dropout=0.3).eval() if off == "eval" else layer_of(inputs, dropout=0.0).train()
    before = torch.get_rng_state()

    got = run(layer, inputs.x, inputs.G)[tensor]

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(got, run(layer_of(inputs), inputs.x, inputs.G)[tensor])
    assert isinstance(layer(inputs.x).grad_fn, RuleProduct._backward_cls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_d12_neutral_start_whatever_the_mask(quant: str | None, dtype: torch.dtype) -> None:
    """With B = 0 the output is the base weight's product of the whole x, to the bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(66, 65, bias=False)).to(dtype)
    layer = apply_dora(model, DoraConfig(rank=4, alpha=8, quant=quant, dropout=0.4))[0]
    x = torch.randn(7, 66).to(dtype)

    W = layer.base.decode(layer.base.weight, dtype=dtype)

    assert torch.equal(layer(x), x @ W.T)


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["dense", "nf4"])
def test_t5_recomputed_activations_see_the_same_mask(quant: QuantConfig | None) -> None:
    """Under activation checkpointing every gradient is the one without it, bit for bit."""
    torch.manual_seed(0)
    model = apply_dora(
        nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)), DoraConfig(2, 4, dropout=0.3, quant=quant)
    )
    for index in (0, 2):
        nn.init.normal_(model[index].lora_B, std=0.1)
    x, gradients = torch.randn(5, 24), []

    for recompute in (False, True):
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad]))

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.any() for g in gradients[0])


def test_efficiency_what_dropout_keeps() -> None:
    """Beside what is kept anyway: the mask as one byte a number; nothing of the weight's size."""
    layer = apply_dora(nn.Sequential(nn.Linear(96, 80)), DoraConfig(rank=2, alpha=4, dropout=0.5, quant="nf4"))[0]
    saved: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 96, requires_grad=True))

    own = {p.data_ptr() for p in layer.parameters()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 4 * (5 * 96 + 5 * 80 + 5 * 2 + 2 * 80) + 5 * 96


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), "half", True], ids=str)
def test_d9_a_rate_that_is_no_probability_is_refused(rate: object) -> None:
    """The message holds the value and what to use."""
    with pytest.raises(OptionError, match=rf"dropout {rate!r} is no probability below 1; use 0\.05"):
        DoraConfig(rank=2, alpha=4, dropout=rate)
