"""D2 to D12 and G on one layer: against float64 autograd, on lattices to the bit."""

import pytest
import torch
from reference import Inputs, autograd, gaussian, lattice, layer_of, run
from torch import nn

from torch_impl import DoraConfig, QuantConfig, apply_dora
from torch_impl.layers.rule import RuleProduct

SHAPES = [(64, 48, 4), (65, 66, 3), (1, 33, 1), (70, 17, 17)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tensor", ["y", "A", "B", "m", "x"])
def test_g_lattice_gradients_equal_float64_autograd_to_the_bit(
    tensor: str, shape: tuple[int, int, int], *, bias: bool
) -> None:
    """On exactly representable inputs the layer and float64 autograd with a detached norm give equal values."""
    inputs = lattice(*shape, bias=bias)

    got = run(layer_of(inputs), inputs.x, inputs.G)[tensor]

    want = autograd(inputs)[tensor]
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), want)
    assert torch.count_nonzero(want) > want.numel() / 4


def test_d12_a_is_drawn_as_torch_draws_a_linear_layer() -> None:
    """PEFT's A is a linear layer of torch, drawn by its own rule: from one seed the same numbers."""
    torch.manual_seed(3)
    want = nn.Linear(24, 5, bias=False).weight
    base = nn.Linear(24, 7)
    torch.manual_seed(3)

    layer = apply_dora(nn.Sequential(base), DoraConfig(5, 5))[0]

    assert torch.equal(layer.lora_A, want)


@pytest.mark.parametrize("tensor", ["y", "A", "B", "m", "x"])
def test_g_gaussian_gradients_agree_with_float64_autograd(tensor: str) -> None:
    """On ordinary numbers the 2-norm of the error is some roundings of the result (576 terms a sum)."""
    inputs = gaussian(96, 576, 8)

    got = run(layer_of(inputs), inputs.x, inputs.G)[tensor].double()

    want = autograd(inputs)[tensor]
    roundings = 8 * 576**0.5  # 8 sigma of a random walk over the longest sum
    assert float((got - want).norm() / want.norm()) <= roundings * 2.0**-24


def test_d5_norm_is_constant() -> None:
    """Differentiating through the norm gives another dB: the layer's isn't that one."""
    inputs = gaussian(16, 24, 2)
    A, B, m, x = (t.double().requires_grad_() for t in (inputs.A, inputs.B, inputs.m, inputs.x))
    V = inputs.W.double() + inputs.scaling * (B @ A)
    ((x @ V.T) * (m / torch.linalg.vector_norm(V, dim=1))).backward(inputs.G.double())

    got = run(layer_of(inputs), inputs.x, inputs.G)["B"].double()

    assert float((got - B.grad).norm() / B.grad.norm()) > 0.1
    assert float((got - autograd(inputs)["B"]).norm() / got.norm()) < 2.0**-16


def test_d5_forward_differences_of_the_frozen_surrogate() -> None:
    """A central difference in m, where the loss is linear, is the gradient (float64 step 1)."""
    inputs = lattice(8, 24, 2, bias=True)
    moved = [layer_of(Inputs(**{**vars(inputs), "m": inputs.m + d * torch.eye(8)[3]})) for d in (1.0, -1.0)]

    high, low = (float((layer(inputs.x).detach() * inputs.G).sum()) for layer in moved)

    assert (high - low) / 2 == float(run(layer_of(inputs), inputs.x, inputs.G)["m"][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_d12_neutral_start_is_the_base_layer_to_the_bit(quant: str | None, dtype: torch.dtype) -> None:
    """With B = 0, c is exactly 1 and y is the base weight's product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(66, 65, bias=False)).to(dtype)
    layer = apply_dora(model, DoraConfig(rank=4, alpha=8, quant=quant))[0]
    x = torch.randn(7, 66).to(dtype)

    W = layer.base.decode(layer.base.weight, dtype=dtype)

    assert torch.equal(layer(x), x @ W.T)


def test_d6_magnitude_starts_from_the_weight_that_is_multiplied_by() -> None:
    """Under NF4 and bf16 m is the norm of the dequantised and cast weight, not of the one that was packed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(66, 65))
    original = torch.linalg.vector_norm(model[0].weight.detach().double(), dim=1)
    layer = apply_dora(model, DoraConfig(rank=4, alpha=8, quant="nf4", compute_dtype=torch.bfloat16))[0]

    magnitude = layer.magnitude.detach().double()
    used = torch.linalg.vector_norm(layer.base.decode(layer.base.weight, dtype=torch.bfloat16).double(), dim=1)

    assert torch.allclose(magnitude, used, rtol=8 * 2.0**-24, atol=0)
    assert float(((magnitude - original) / original).abs().max()) > 2.0**-8


def test_d6_reset_reads_the_present_adapter() -> None:
    """After B changes, reset_magnitude gives the norm of W + s B A, and c is 1 again."""
    inputs = gaussian(33, 24, 3)
    layer = layer_of(inputs)

    layer.reset_magnitude()

    V = inputs.W.double() + inputs.scaling * (inputs.B.double() @ inputs.A.double())
    assert torch.allclose(layer.magnitude.double(), torch.linalg.vector_norm(V, dim=1), rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("cancelled", [False, True], ids=["zero-weight", "cancelled"])
@pytest.mark.parametrize("tensor", ["y", "A", "B", "m", "x"])
def test_d7_zero_rows_pass_their_bias_and_no_gradient(tensor: str, *, cancelled: bool) -> None:
    """Where V's row is 0, y is the bias, dm and dB are 0, dA and dx get nothing, and nothing is NaN."""
    inputs = lattice(64, 48, 4, bias=True)
    inputs.W[5] = -2.0 * (inputs.B[5] @ inputs.A) if cancelled else 0
    inputs.B[5] = inputs.B[5] if cancelled else 0
    inputs.m[5] = 0 if cancelled else 7

    got = run(layer_of(inputs), inputs.x, inputs.G)

    assert torch.equal(got[tensor].double(), autograd(inputs)[tensor])
    assert torch.equal(got["y"][:, 5], inputs.b[5].expand(9))
    assert not got["m"][5]
    assert not got["B"][5].any()


@pytest.mark.parametrize("size", [1e-25, 1e20], ids=str)
def test_d4_layer_works_on_tiny_and_huge_rows(size: float) -> None:
    """A row at 1e-25 or 1e20 gives m / n times its product, finite, as float64 does."""
    inputs = gaussian(16, 24, 2)
    inputs.W[3] *= size
    inputs.B[3] *= size
    inputs.G[:, 3] *= min(1.0, 1 / size)

    got, want = run(layer_of(inputs), inputs.x, inputs.G), autograd(inputs)

    errors = {k: float((got[k].double() - want[k]).norm() / want[k].norm()) for k in got}
    assert max(errors.values()) <= 8 * 24**0.5 * 2.0**-24, errors


def test_d8_bias_is_not_scaled() -> None:
    """The output at x = 0 is the bias, whatever c is."""
    inputs = gaussian(16, 24, 2)

    y = layer_of(inputs)(torch.zeros(3, 24))

    assert torch.equal(y, inputs.b.expand(3, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_d11_adapter_and_its_gradients_are_float32(dtype: torch.dtype) -> None:
    """Whatever the model's dtype, A, B, m and their gradients are float32, and y and dx have x's dtype."""
    torch.manual_seed(0)
    layer = apply_dora(nn.Sequential(nn.Linear(24, 16).to(dtype)), DoraConfig(rank=2, alpha=4))[0]

    got = run(layer, torch.randn(5, 24).to(dtype), torch.randn(5, 16).to(dtype))

    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.magnitude.dtype} == {torch.float32}
    assert {got[k].dtype for k in ("A", "B", "m")} == {torch.float32}
    assert {got[k].dtype for k in ("y", "x")} == {dtype}


def test_d11_autocast_does_not_reach_the_layer() -> None:
    """Under autocast a float32 layer still computes in its own compute dtype."""
    inputs = gaussian(16, 24, 2)
    layer = layer_of(inputs)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(inputs.x)

    assert torch.equal(y, layer(inputs.x))


def test_x_may_have_any_leading_shape() -> None:
    """(batch, sequence, in) is the same as (tokens, in), and no tokens give no rows."""
    inputs = gaussian(16, 24, 2)
    layer = layer_of(inputs)
    x = torch.randn(2, 3, 24)

    assert torch.equal(layer(x).view(6, 16), layer(x.view(6, 24)))
    assert layer(torch.zeros(0, 24)).shape == (0, 16)


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["dense", "nf4"])
def test_efficiency_nothing_of_the_weight_s_size_is_kept(quant: QuantConfig | None) -> None:
    """The Function saves activations and references to parameters; a decoded weight isn't among them."""
    model = nn.Sequential(nn.Linear(96, 80))
    layer = apply_dora(model, DoraConfig(rank=2, alpha=4, quant=quant))[0]
    kept: list[torch.Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 96, requires_grad=True))

    own = {p.data_ptr() for p in layer.parameters()}
    fresh = [t for t in kept if t.data_ptr() not in own]
    assert max(t.numel() for t in fresh) <= 5 * 96
    assert sum(t.numel() for t in fresh) == 5 * 96 + 5 * 80 + 5 * 2 + 2 * 80


def test_efficiency_packed_weight_is_decoded_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decode in forward, one in backward, none in backward where x needs no gradient."""
    from torch_impl.layers import quant  # noqa: PLC0415 - patched here only

    layer = apply_dora(nn.Sequential(nn.Linear(96, 80)), DoraConfig(rank=2, alpha=4, quant="nf4"))[0]
    calls, plain = [], quant.decode
    monkeypatch.setattr(quant, "decode", lambda *a, **k: calls.append(1) or plain(*a, **k))
    counts = []
    for needs in (True, False):
        layer(torch.randn(5, 96, requires_grad=needs)).sum().backward()
        counts.append(len(calls))

    assert counts == [2, 3]


def test_g_double_backward_is_refused() -> None:
    """The closed form is differentiated once; a second time raises instead of being wrong."""
    layer = layer_of(gaussian(16, 24, 2))
    x = torch.randn(3, 24, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_one_autograd_node_at_the_entry() -> None:
    """The input has one consumer, so that FSDP2's own nodes can't regroup sums of dx."""
    x = torch.randn(3, 24, requires_grad=True)

    y = layer_of(gaussian(16, 24, 2))(x)

    inputs = [f for f, _ in y.grad_fn.next_functions if f is not None and getattr(f, "variable", None) is x]
    assert isinstance(y.grad_fn, RuleProduct._backward_cls)
    assert len(inputs) == 1


@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_d11_a_cast_of_the_model_leaves_adapters_in_float32(quant: str | None) -> None:
    """`model.to(bfloat16)` after `apply_dora`: A, B, m and their moments keep their bits and dtype, and it trains."""
    model = apply_dora(
        nn.Sequential(nn.Linear(32, 24), nn.LayerNorm(24)), DoraConfig(3, 6, quant=quant, target_modules=["0"])
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    model.to(torch.bfloat16)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(trained[name], value) for name, value in before.items())
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert model[1].weight.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(trained.values())
    for _ in range(2):
        model(torch.randn(4, 32, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any(torch.equal(trained[name], value) for name, value in before.items())
