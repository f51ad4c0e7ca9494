"""The product that goes to oneDNN: on every shape and layout that the layers hand it."""

import pytest
import torch
from torch import Tensor

from torch_impl.products import HAS_ONEDNN, product

LAYOUTS = {
    "whole": lambda W: W.clone(),
    "transposed": lambda W: W.T.contiguous().T,
    "columns of a wider one": lambda W: torch.cat([W, W], dim=1)[:, : W.shape[1]],
    "columns of a transposed one": lambda W: torch.cat([W, W]).T.contiguous().T[: W.shape[0]],
    "every second row": lambda W: W.repeat_interleave(2, dim=0)[::2],
}
SIZES = [(0, 3, 2), (1, 1, 1), (1, 64, 7), (5, 1, 3), (7, 33, 1), (4, 0, 3), (64, 96, 40)]


def small_integers(*shape: int) -> Tensor:
    """Numbers whose products and sums float32 holds exactly, in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "I", "O"), SIZES, ids=str)
def test_is_exact_on_small_integers(T: int, I: int, O: int, layout: str) -> None:  # noqa: E741 - axes
    """Whatever the kernel's order of summation, empty axes included."""
    x, W = LAYOUTS[layout](small_integers(T, I)), LAYOUTS[layout](small_integers(O, I))

    y = product(x, W)

    assert y.shape == (T, O)
    assert torch.equal(y.double(), x.double() @ W.double().T)


def test_leading_axes_stay() -> None:
    """As in a batch of sequences."""
    x, W = small_integers(2, 3, 5), small_integers(4, 5)

    assert torch.equal(product(x, W), x @ W.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    """They need no help."""
    x, W = torch.randn(9, 33).to(dtype), torch.randn(5, 33).to(dtype)

    assert torch.equal(product(x, W), x @ W.T)


def test_float32_is_within_its_rounding_and_no_narrower() -> None:
    """Exact but for at most I roundings of the absolute sum: a product in bfloat16 or tf32 would be a thousand off."""
    x, W = torch.randn(50, 300), torch.randn(20, 300)

    error = (product(x, W).double() - x.double() @ W.double().T).abs()

    assert HAS_ONEDNN
    assert (error <= 300 * 2.0**-24 * (x.double().abs() @ W.double().abs().T)).all()


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_float32_is_given_to_onednn(dtype: torch.dtype, *, taken: bool) -> None:
    """Its speed is what the product is for; torch gives bfloat16 to it without being asked."""
    x, W = torch.ones(9, 33, dtype=dtype), torch.ones(5, 33, dtype=dtype)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        product(x, W)

    assert any(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) is taken


def test_gradients_are_torchs_own() -> None:
    """OneDNN's operator has none; where autograd records, torch's product is taken."""
    x, W = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)

    product(x, W).sum().backward()

    assert torch.equal(x.grad, W.sum(dim=0).expand(3, 4))
