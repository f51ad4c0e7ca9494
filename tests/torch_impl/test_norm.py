"""D3, D4, D7, D13: the row norms against float64, at every level of cancellation and every size."""

import math
from types import SimpleNamespace as Settings

import pytest
import torch
from reference import gaussian
from torch import Tensor

from torch_impl.layers.norm import CONDITION, _factored, _products_are_narrowed, ratio, weight_norm

U = 2.0**-24  # half an ulp, float32's unit roundoff


def exact_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """D3 in float64, scaled by each row's largest entry."""
    V = W.double() + scaling * (B.double() @ A.double())
    largest = V.abs().amax(dim=1, keepdim=True)
    safe = torch.where(largest > 0, largest, 1)
    return (safe * torch.linalg.vector_norm(V / safe, dim=1, keepdim=True)).squeeze(1)


def allowed(fan_in: int) -> float:
    """Relative error of a trusted row: CONDITION / 2 of that of a sum of squares; 8 sigma of a random walk in 8 lanes.

    Lanes of fan_in / 8 terms each, and 16 terms across lanes and terms of the formula; each rounding at most U.
    """
    return CONDITION / 2 * 8 * U * math.sqrt(fan_in / 8 / 3 / 8 + 16 / 3)


def worst(norm: Tensor, want: Tensor) -> float:
    """Largest relative error over the rows."""
    return float(((norm.double() - want) / want).abs().max())


@pytest.mark.parametrize("fan_in", [5, 66, 576, 4096])
@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 100.0], ids=lambda s: f"b-times-{s}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_d13_norm_is_accurate_at_every_adapter_size(dtype: torch.dtype, strength: float, fan_in: int) -> None:
    """Every row's norm is within a few ulps of float64, small or large as the adapter may be."""
    case = gaussian(70, fan_in, 4)
    W, B = case.W.to(dtype), case.B * strength

    norm = weight_norm(W, case.A, B, scaling=case.scaling)

    assert norm.dtype == torch.float32
    assert worst(norm, exact_norm(W, case.A, B, case.scaling)) <= allowed(fan_in)


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5, 1e-7, 1e-12], ids=str)
def test_d13_norm_is_accurate_where_the_adapter_cancels_the_weight(left: float) -> None:
    """Rows with W = -s B A + tiny go to float64: accurate to a rounding, where the factored form gives NaN or noise."""
    case = gaussian(64, 96, 4)
    B = case.B * 20
    W = (-case.scaling * (B.double() @ case.A.double())).float() + left * case.W

    norm = weight_norm(W, case.A, B, scaling=case.scaling)

    assert worst(norm, exact_norm(W, case.A, B, case.scaling)) <= allowed(96)


def test_d13_the_guard_is_needed() -> None:
    """Without the guard the factored form is off by more than its bound on cancelling rows (or is negative)."""
    case = gaussian(64, 96, 4)
    B = case.B * 20
    W = (-case.scaling * (B.double() @ case.A.double())).float() + 1e-4 * case.W

    squared, trusted = _factored(W, case.A, B, scaling=case.scaling, cut=None)
    error = ((squared.double() / exact_norm(W, case.A, B, case.scaling) ** 2) - 1).abs()

    assert not trusted.any()
    assert float(error.max()) > allowed(96)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_d11_the_norm_is_float32_also_where_products_may_be_less(precision: str) -> None:
    """With TF32 or bfloat16 allowed, every row's norm is the float64 one, rounded once."""
    made = gaussian(40, 300, 8)
    want = exact_norm(made.W, made.A, made.B, made.scaling).float()
    before = torch.get_float32_matmul_precision()

    torch.set_float32_matmul_precision(precision)
    try:
        n = weight_norm(made.W, made.A, made.B, scaling=made.scaling)
    finally:
        torch.set_float32_matmul_precision(before)

    assert torch.equal(n, want)
    assert not torch.equal(weight_norm(made.W, made.A, made.B, scaling=made.scaling), want)


def test_d13_rows_that_the_adapter_moves_by_less_than_a_third_stay_fast() -> None:
    """An adapter below a third of its row's norm costs no float64."""
    case = gaussian(64, 96, 4)
    size = torch.linalg.vector_norm(case.W, dim=1)
    terms = case.scaling * (case.B.abs() @ torch.linalg.vector_norm(case.A, dim=1))
    B = case.B * (0.33 * size / terms)[:, None]

    _, trusted = _factored(case.W, case.A, B, scaling=case.scaling, cut=None)

    assert trusted.all()


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-25, 1e-20, 1e-15, 1e-13, 1e15, 1e19, 1e20, 1e30, 1e36], ids=str)
@pytest.mark.parametrize("with_adapter", [False, True], ids=["b-zero", "b"])
def test_d4_norm_neither_underflows_nor_overflows(size: float, *, with_adapter: bool) -> None:
    """A row of any size has its right norm, among rows of ordinary size."""
    case = gaussian(8, 66, 4)
    W, B = case.W.clone(), case.B * float(with_adapter)
    W[3] *= size
    B[3] *= min(size, 1e30)

    norm = weight_norm(W, case.A, B, scaling=case.scaling)
    want = exact_norm(W, case.A, B, case.scaling)

    subnormal = 2.0**-150 / want.clamp(min=2.0**-149)
    assert bool(((norm.double() - want).abs() <= want * (allowed(66) + subnormal)).all())


@pytest.mark.parametrize(("tiny", "huge"), [(1e-25, 1e25), (1e25, 1e-25)], ids=["tiny-A", "tiny-B"])
def test_d4_factors_of_opposite_sizes_multiply_right(tiny: float, huge: float) -> None:
    """A A' may underflow or overflow though B A doesn't: such rows go to float64."""
    case = gaussian(8, 66, 4)
    A, B = case.A * tiny, case.B * huge

    norm = weight_norm(case.W, A, B, scaling=case.scaling)

    assert worst(norm, exact_norm(case.W, A, B, case.scaling)) <= allowed(66)


def test_d4_norm_is_zero_only_where_every_entry_is() -> None:
    """The norm is 0 on a zero row and on an exactly cancelled one, and on no other, down to the smallest float32."""
    W = torch.zeros(4, 3)
    W[1, 2] = 2.0**-149
    W[2] = torch.tensor([-2.0, -4.0, -6.0])
    W[3] = torch.tensor([-2.0, -4.0, -6.0000005])
    A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0], [0.0], [2.0], [2.0]])

    norm = weight_norm(W, A, B, scaling=1.0)

    assert (norm == 0).tolist() == [True, False, True, False]


def test_d4_a_row_below_float32_is_not_zero() -> None:
    """Where V's entries are products of 1e-60, n is the smallest float32, not 0: only a zero row has n = 0."""
    A, B = torch.full((1, 3), 1e-30), torch.tensor([[1e-30], [0.0]])

    norm = weight_norm(torch.zeros(2, 3), A, B, scaling=1.0)

    assert norm.tolist() == [2.0**-149, 0.0]


def test_d7_ratio_is_zero_where_the_norm_is() -> None:
    """The ratio is m / n, and 0 (not NaN, not infinity) on zero rows."""
    assert ratio(torch.tensor([0.0, 3.0, 3.0]), torch.tensor([0.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 1.5]


def test_d4_a_poisoned_adapter_is_not_hidden_by_a_zero_b() -> None:
    """0 times NaN is NaN: the short way for B = 0 is taken only where A is finite."""
    W, A, B = torch.ones(3, 4), torch.full((2, 4), torch.nan), torch.zeros(3, 2)

    assert bool(torch.isnan(weight_norm(W, A, B, scaling=1.0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_d13_a_weight_stored_by_columns_has_the_same_squares(dtype: torch.dtype) -> None:
    """Where W is a view of an (I, O) tensor, n^2 or the rows that are trusted are others than where it is not."""
    inputs = gaussian(33, 40, 3)
    by_rows = inputs.W.to(dtype)
    by_columns = by_rows.T.contiguous().T
    squared, trusted = _factored(by_rows, inputs.A, inputs.B, scaling=inputs.scaling, cut=None)

    got, got_trusted = _factored(by_columns, inputs.A, inputs.B, scaling=inputs.scaling, cut=None)

    assert torch.equal(got_trusted, torch.ones_like(trusted))
    assert bool(trusted.all())
    assert float(((got - squared) / squared).abs().max()) <= allowed(40)


def test_d4_a_fresh_adapter_of_more_rows_than_inputs_keeps_tiny_rows() -> None:
    """At B = 0 and R > I a row of 1e-30, whose square float32 flushes, has the norm 0."""
    W, A, B = torch.full((1, 3), 1e-30), torch.ones(4, 3), torch.zeros(1, 4)

    got = weight_norm(W, A, B, scaling=1.0)

    assert worst(got, exact_norm(W, A, B, 1.0)) <= allowed(3)


@pytest.mark.parametrize(("backend", "narrowed"), [("mkldnn", True), ("cuda", False)])
def test_d13_only_the_devices_own_setting_narrows_its_products(
    monkeypatch: pytest.MonkeyPatch, backend: str, *, narrowed: bool
) -> None:
    """The norm on a CPU heeds the setting of CUDA's products, or not that of oneDNN's."""
    settings = {name: "tf32" if name == backend else "ieee" for name in ("mkldnn", "cuda")}
    devices = {name: Settings(matmul=Settings(fp32_precision=setting)) for name, setting in settings.items()}
    monkeypatch.setattr(torch, "backends", Settings(**devices))

    got = _products_are_narrowed(torch.device("cpu"))

    assert got is narrowed
