"""D3, D9: layers of every kind on the same numbers as `ref`'s closed forms and as peft's layers."""

import pytest
import torch
from judges import peft, ref_layer
from layer_kinds import KINDS, OTHERS, PEFTS_CONVOLUTIONS, SCALING, lattice_of
from reference import Inputs, fill, run
from torch import Tensor, nn

from torch_impl import DoraConfig, DoraLayer, apply_dora

RATE = 0.5
of_kinds = pytest.mark.parametrize("name", KINDS)
of_masked = pytest.mark.parametrize(
    "name", ["conv1d", "1d-causal", "2d-same", "2d-dilated-groups", "1d-reflect-same", "2d-replicate-groups"]
)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's


def adapted(module: nn.Module, it: Inputs, **config: object) -> DoraLayer:
    """What `apply_dora` makes of the module, holding these numbers."""
    rank = it.B.shape[1]
    made = DoraConfig(rank=rank, alpha=SCALING * rank, target_modules=["0"], **config)
    return fill(apply_dora(nn.Sequential(module), made)[0], it)


def kept(it: Inputs) -> Tensor:
    """Fixed numbers of x to keep."""
    return torch.rand(it.x.shape, generator=torch.Generator().manual_seed(7)) >= RATE


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same tensors, to the bit, and hardly any of them zero; a look-up's A has a column for each id that came."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].double(), tensor), name
        assert torch.count_nonzero(tensor) > tensor.numel() / 8, name
        assert got[name].dtype == torch.float32


@of_kinds
def test_d3_output_and_gradients_are_refs_to_the_bit(name: str) -> None:
    """On exactly representable inputs y, dA, dB, dm and dx equal the float64 closed forms; the bias stays frozen."""
    module = KINDS[name]()
    it = lattice_of(module)

    got = run(adapted(module, it), it.x, it.G)

    assert_equal(got, ref_layer(module, it))


@of_masked
def test_d9_output_and_gradients_under_a_mask_are_refs_to_the_bit(name: str) -> None:
    """So they do with dropout, where the mask is laid around x as x is padded."""
    module = KINDS[name]()
    it = lattice_of(module)
    keep = kept(it)

    got = run(adapted(module, it, dropout=RATE), it.x, it.G, keep=keep)

    assert_equal(got, ref_layer(module, it, mask=keep / (1 - RATE)))


@pytest.mark.parametrize("name", [*OTHERS, *PEFTS_CONVOLUTIONS])
def test_d3_output_and_gradients_are_pefts_to_the_bit(name: str) -> None:
    """Peft in float64 has them too, at groups 1, dilation 1 and zeros around."""
    module = KINDS[name]()
    it = lattice_of(module)

    got = run(adapted(module, it), it.x, it.G)

    assert_equal(got, peft(KINDS[name](), it))


@pytest.mark.parametrize("name", ["conv1d", *PEFTS_CONVOLUTIONS])
def test_d9_output_and_gradients_under_a_mask_are_pefts_to_the_bit(name: str) -> None:
    """And under the same mask."""
    module = KINDS[name]()
    it = lattice_of(module)
    keep = kept(it)

    got = run(adapted(module, it, dropout=RATE), it.x, it.G, keep=keep)

    assert_equal(got, peft(KINDS[name](), it, mask=keep / (1 - RATE)))


@pytest.mark.parametrize("name", ["conv1d", "embedding", "2d-dilated-groups"])
def test_d3_gaussian_gradients_agree_with_refs(name: str) -> None:
    """On ordinary numbers the 2-norm of the error is some roundings of the result (a few hundred terms a sum)."""
    module = KINDS[name]()
    it = lattice_of(module)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=g)
    for field in ("A", "B", "G"):
        setattr(it, field, torch.randn(getattr(it, field).shape, generator=g))
    it.W, it.m = module.weight.detach().clone(), it.m + torch.rand(it.m.shape, generator=g)
    it.b = None if it.b is None else module.bias.detach().clone()

    got = run(adapted(module, it), it.x, it.G)

    want = ref_layer(module, it)
    errors = {k: float((got[k].double() - want[k]).norm() / want[k].norm()) for k in want}
    assert max(errors.values()) <= 8 * 576**0.5 * 2.0**-24, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_kinds
def test_d12_neutral_start_is_the_plain_layer_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """A fresh adapter computes what its layer did; only torch may add the bias before it rounds, so it is left out."""
    module = KINDS[name]()
    it = lattice_of(module)
    torch.manual_seed(1)
    module = KINDS[name]().to(dtype)
    if getattr(module, "bias", None) is not None and name != "conv1d":
        module.bias = None
    elif name == "conv1d":
        module.bias.data.zero_()
    x = torch.randn(it.x.shape).to(dtype) if it.x.is_floating_point() else it.x
    want = module(x).detach()

    layer = apply_dora(nn.Sequential(module), DoraConfig(rank=2, alpha=4, target_modules=["0"], dropout=0.3))[0].train()

    assert torch.equal(layer(x).detach(), want)
    assert layer(x).dtype == want.dtype


@of_kinds
def test_d12_initial_factors_are_distributed_as_pefts(name: str) -> None:
    """A fills the interval that peft draws from, B is zero; an embedding's A is zero and its B standard normal."""
    torch.manual_seed(0)
    layer = apply_dora(nn.Sequential(KINDS[name]()), DoraConfig(rank=3, alpha=4, target_modules=["0"]))[0]

    if "embedding" in name:
        assert not layer.lora_A.any()
        assert 0.7 < float(layer.lora_B.detach().std()) < 1.3
        return
    limit = layer.rows.length**-0.5
    assert not layer.lora_B.any()
    assert 0.85 * limit < float(layer.lora_A.detach().abs().max()) <= limit * (1 + 2.0**-22)


def test_d9_an_embedding_drops_nothing() -> None:
    """Ids are no numbers: dropout leaves an embedding as it is, as peft does."""
    module = nn.Embedding(20, 10)
    it = lattice_of(module)
    layer = adapted(module, it, dropout=0.9).train()

    assert torch.equal(layer(it.x), layer.eval()(it.x))


@pytest.mark.parametrize("name", ["1d", "2d-circular", "3d-groups"])
def test_a_convolution_takes_one_example_without_a_batch(name: str) -> None:
    """(I, space) is the same as the only one of a batch, under a mask too."""
    module = KINDS[name]()
    it = lattice_of(module)
    layer = adapted(module, it, dropout=RATE)
    keep = kept(it)

    assert torch.equal(layer(it.x[0], keep[0]), layer(it.x[:1], keep[:1])[0])


@pytest.mark.parametrize("name", ["1d-strided", "3d-groups"])
def test_a_convolution_answers_to_torchs_words(name: str) -> None:
    """A model may ask its layer for its stride and the like."""
    module = KINDS[name]()
    layer = adapted(module, lattice_of(module))

    words = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert [getattr(layer, word) for word in words] == [getattr(module, word) for word in words]
    with pytest.raises(AttributeError, match="no_such_word"):
        _ = layer.no_such_word


def test_d1_rank_stabilised_scaling_reaches_every_kind() -> None:
    """With rank_stabilized the scaling of each kind is alpha / sqrt(r), which peft calls use_rslora."""
    layers = [
        apply_dora(nn.Sequential(make()), DoraConfig(2, 3, ["0"], rank_stabilized=True))[0] for make in KINDS.values()
    ]

    assert {layer.scaling for layer in layers} == {3 / 2**0.5}
