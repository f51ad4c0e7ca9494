"""The product that goes to oneDNN: on every shape and layout that the layers hand it."""

from pathlib import Path

import pytest
import torch
from ranks import Pools
from torch import Tensor

from torch_impl.layers import products
from torch_impl.layers.products import HAS_ONEDNN, product

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


@pytest.mark.parametrize(
    ("dtype", "kernel", "taken"),
    [(torch.float32, "onednn", True), (torch.float32, "torch", False), (torch.bfloat16, "onednn", False)],
    ids=str,
)
def test_float32_is_given_to_the_faster_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernel: str, *, taken: bool
) -> None:
    """Its speed is what the product is for; torch gives bfloat16 to oneDNN without being asked."""
    monkeypatch.setattr(products, "float32_kernel", lambda: kernel)
    x, W = torch.ones(9, 33, dtype=dtype), torch.ones(5, 33, dtype=dtype)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        product(x, W)

    assert any(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) is taken


def test_gradients_are_torchs_own() -> None:
    """OneDNN's operator has none; where autograd records, torch's product is taken."""
    x, W = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)

    product(x, W).sum().backward()

    assert torch.equal(x.grad, W.sum(dim=0).expand(3, 4))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine where nothing was chosen yet; its cache."""
    monkeypatch.setenv("DORA_PARITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "_agreed", [])
    products._of_this_machine.cache_clear()
    yield tmp_path / "cache"
    products._of_this_machine.cache_clear()


@pytest.mark.parametrize(("slower", "want"), [("torch", "onednn"), ("onednn", "torch")])
def test_the_faster_one_is_found_and_kept(monkeypatch: pytest.MonkeyPatch, fresh: Path, slower: str, want: str) -> None:
    """By a probe at first use; the next process reads what it found."""
    seconds = iter([1.0, 2.0] * 99 if slower == "torch" else [2.0, 1.0] * 99)
    monkeypatch.setattr(products, "_seconds", lambda _: next(seconds))
    assert products.float32_kernel() == want

    products._of_this_machine.cache_clear()
    monkeypatch.setattr(products, "_probe", lambda: pytest.fail("it was kept"))
    assert products.float32_kernel() == want
    assert [path.name.startswith("product-") for path in fresh.iterdir()] == [True]


@pytest.mark.usefixtures("fresh")
def test_who_writes_first_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that probe at once, and find otherwise, multiply alike."""

    def late() -> str:
        products._cache_file().write_text('{"float32": "torch"}')
        return "onednn"

    monkeypatch.setattr(products, "_probe", late)

    assert products.float32_kernel() == "torch"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("held", ["", "[]", '{"float32": 3}', "{"])
def test_a_cache_that_is_broken_means_torchs_own(held: str) -> None:
    """Its bits are those of the plain layer."""
    place = products._cache_file()
    place.parent.mkdir()
    place.write_text(held)

    assert products.float32_kernel() == "torch"


def test_no_cache_means_torchs_own(fresh: Path) -> None:
    """A choice that can't be kept might be another one in the next process."""
    fresh.write_text("a file, where the folder should be")

    assert products.float32_kernel() == "torch"


@pytest.mark.distributed
def test_ranks_take_the_first_ones_choice(pools: Pools) -> None:
    """Machines that differ would else sum in other orders."""
    assert pools.run(2, "wires:kernels") == ["onednn", "onednn"]


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"HOME": "home"}, "home/.cache/dora-parity"),
        ({"HOME": "home", "XDG_CACHE_HOME": "caches"}, "caches/dora-parity"),
        ({"HOME": "home", "XDG_CACHE_HOME": "caches", "DORA_PARITY_CACHE": "own"}, "own"),
    ],
    ids=["home", "xdg", "own"],
)
def test_the_choice_lies_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], place: str
) -> None:
    """The one that the pretrained model is kept in."""
    for name in ("XDG_CACHE_HOME", "DORA_PARITY_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, str(tmp_path / value))

    assert products._cache_file().parent == tmp_path / place
