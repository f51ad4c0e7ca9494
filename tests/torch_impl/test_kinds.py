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
