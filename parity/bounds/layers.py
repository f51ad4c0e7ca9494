"""One DoRA layer, forward and backward, on tracked numbers: the error of its output and of its three gradients.

    V = W + s B A        n = ||V||        c = m / n        y0 = x W' + s (x A') B'        y = c y0 + b
    H = G c              dm = sum_t(G y0) / n              dB = s H' (x A')               dA = s (H B)' x

(SEMANTICS D1 to D8, D13 and the closed form of G.) Axes: T tokens, I in, O out, R rank.

Where implementations may choose, `either` takes the larger error of the two routes: `y0` with V formed or not, `n`
directly or factored. The factored norm counts only where the terms it sums are at most `CANCELLATION` times the
square they leave; elsewhere D13's guard demands the direct form, and the bound demands its accuracy.

**Coherent errors.** The error of one element of A, B or c enters the sum over tokens with every token, so there it
does not average out. With `D = G' x` (out, in), to first order,

    dm_i = <D_i, V_i> / n_i        dB_ir = s c_i <D_i, A_r>        dA_rj = s sum_i c_i B_ir D_ij

and the variances of A, B and c are added through these, while the products themselves run on calm operands. The norm
is treated alike. Guards need no such care: they bound absolute errors, however correlated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.tracked import Array, Tracked

CANCELLATION: Final = 2.0**10
"""D13: the factored norm may lose this factor, 10 of float32's 24 bits, to cancellation; beyond it the direct form
is demanded. `ref.dora.guarded_rows` and its like guard earlier, so that the bound covers every row they factor."""


@dataclass(frozen=True)
class Precision:
    """T4: the unit roundoffs, `2^-p` for p significant bits (half the distance from 1 to the next number)."""

    unit: float
    """Of sums, norms, magnitudes, adapters, gradients, reduction and optimizer state."""
    compute_unit: float
    """Of the operands and of the outputs of the products with x, W, A, B and G; sums inside them are at `unit`."""


FLOAT64: Final = Precision(unit=2.0**-53, compute_unit=2.0**-53)
FLOAT32: Final = Precision(unit=2.0**-24, compute_unit=2.0**-24)
BFLOAT16_COMPUTE: Final = Precision(unit=2.0**-24, compute_unit=2.0**-8)


@dataclass(frozen=True)
class Adapter:
    """A layer's trained tensors, tracked: after an update they carry the error of the steps before."""

    lora_A: Tracked  # noqa: N815 (PEFT's name)
    """(rank, in)."""
    lora_B: Tracked  # noqa: N815 (PEFT's name)
    """(out, rank)."""
    magnitude: Tracked
    """(out,)."""


@dataclass(frozen=True)
class Layer:
    """What a layer's forward and backward share within one step: all that does not depend on the tokens."""

    weight: Tracked
    """W as the forward multiplies by it, (out, in); exact."""
    bias: Tracked | None
    """(out,); exact."""
    lora_A: Tracked  # noqa: N815 (PEFT's name)
    """A cast to the compute format, (rank, in)."""
    lora_B: Tracked  # noqa: N815 (PEFT's name)
    """B cast to the compute format, (out, rank)."""
    norm: Tracked
    """n, (out,)."""
    ratio: Tracked
    """c, (out,)."""
    scaling: float
    """s."""
    precision: Precision
    """The formats."""
    d9: bool
    """Whether y may be formed as PEFT forms it (D9): `x W' + (c - 1) x W' + c s (x A') B'`."""


def prepare(
    weight: Tracked,
    adapter: Adapter,
    *,
    scaling: float,
    precision: Precision,
    bias: Tracked | None = None,
    d9: bool = False,
) -> Layer:
    """D4, D7, D11: the norm and the ratio at `unit` from the uncast adapter, and the operands of the products."""
    norm = weight_norm(weight, adapter.lora_A, adapter.lora_B, scaling=scaling, unit=precision.unit)
    ratio = tr.divide(adapter.magnitude, norm, precision.unit)
    lora_A, lora_B = (tr.cast(t, precision.compute_unit) for t in (adapter.lora_A, adapter.lora_B))
    return Layer(weight, bias, lora_A, lora_B, norm, ratio, scaling, precision, d9)


def weight_norm(weight: Tracked, lora_A: Tracked, lora_B: Tracked, *, scaling: float, unit: float) -> Tracked:
    """D3, D4, D13: n by rows, (out,): directly, or factored where that does not cancel."""
    A, B = tr.calm(lora_A), tr.calm(lora_B)
    delta = tr.scale(tr.matmul(B, A, unit), scaling, unit)
    direct = _direct_norm(tr.add(weight, delta, unit), unit)
    square, terms = _factored_square(weight, A, B, scaling=scaling, unit=unit)
    factored = tr.either(direct, tr.sqrt(Tracked(direct.value**2, square.variance, square.guard), unit))
    allowed = terms <= CANCELLATION * direct.value**2
    chosen = Tracked(
        direct.value,
        np.where(allowed, factored.variance, direct.variance),
        np.where(allowed, factored.guard, direct.guard),
    )
    shared = _norm_variance(weight.value, lora_A, lora_B, scaling=scaling, unit=unit)
    return tr.stirred(chosen, shared)


def merged(weight: Tracked, lora_A: Tracked, lora_B: Tracked, magnitude: Tracked, *, scaling: float) -> Tracked:
    """D10: `c * V` in float32, (out, in)."""
    unit = FLOAT32.unit
    norm = weight_norm(weight, lora_A, lora_B, scaling=scaling, unit=unit)
    V = tr.add(weight, tr.scale(tr.matmul(lora_B, lora_A, unit), scaling, unit), unit)
    return tr.multiply(V, tr.divide(magnitude, norm, unit)[:, None], unit)


def forward(layer: Layer, x: Tracked) -> tuple[Tracked, Tracked]:
    """`(y0, y)`, both (tokens, out): y0 calm, with its own roundings alone, and y with every error.

    The calm one feeds `dm`, to which `backward` adds what the adapter's errors do, coherently.
    """
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    base, update, formed = _products(layer, x)
    y0 = tr.either(tr.add(base, update, compute), formed)
    full = tr.stirred(y0, _adapter_variance(layer, x.value))
    y = tr.multiply(full, layer.ratio[None, :], unit)
    if layer.d9:
        y = tr.either(y, _d9_output(layer, base, update))
    if layer.bias is not None:
        y = tr.add(y, layer.bias[None, :], unit)
    return y0, tr.cast(y, compute)


def backward(layer: Layer, x: Tracked, y0: Tracked, G: Tracked) -> tuple[Adapter, Tracked]:
    """The gradients of A, B and magnitude, and `dx` (tokens, in), for the cotangent `G` (tokens, out) of this rank."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    own = _with_calm_adapter(layer)
    D = G.value.T @ x.value
    H = tr.cast(tr.multiply(G, own.ratio[None, :], unit), compute)
    u = tr.matmul(x, own.lora_A.T, unit, output_unit=compute)
    dB = tr.scale(tr.matmul(H.T, u, unit, output_unit=compute), layer.scaling, compute)
    hB = tr.matmul(H, own.lora_B, unit, output_unit=compute)
    dA = tr.scale(tr.matmul(hB.T, x, unit, output_unit=compute), layer.scaling, compute)
    products = tr.cast(tr.multiply(G, y0, unit), compute)
    dm = tr.divide(tr.total(products, 0, unit), own.norm, unit)
    gradients = Adapter(
        tr.stirred(dA, _shared_in_lora_a(layer, D)),
        tr.stirred(dB, _shared_in_lora_b(layer, D)),
        tr.stirred(dm, _shared_in_magnitude(layer, D)),
    )
    return gradients, _dx(layer, G)


def _products(layer: Layer, x: Tracked) -> tuple[Tracked, Tracked, Tracked]:
    """`x W'`, `s (x A') B'` and, formed otherwise, their sum `x V'`: all calm in the adapter."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    A, B = tr.calm(layer.lora_A), tr.calm(layer.lora_B)
    base = tr.matmul(x, layer.weight.T, unit, output_unit=compute)
    inner = tr.matmul(x, A.T, unit, output_unit=compute)
    update = tr.scale(tr.matmul(inner, B.T, unit, output_unit=compute), layer.scaling, compute)
    delta = tr.scale(tr.matmul(B, A, unit, output_unit=compute), layer.scaling, compute)
    V = tr.add(layer.weight, delta, compute)
    return base, update, tr.matmul(x, V.T, unit, output_unit=compute)


def _d9_output(layer: Layer, base: Tracked, update: Tracked) -> Tracked:
    """D9 without dropout, as PEFT has it: `x W' + ((c - 1) x W' + c s (x A') B')`."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    less_one = tr.cast(tr.subtract(layer.ratio, tr.exact(np.ones(layer.ratio.shape)), unit), compute)
    part = tr.multiply(base, less_one[None, :], compute)
    rest = tr.add(part, tr.multiply(update, tr.cast(layer.ratio, compute)[None, :], compute), compute)
    return tr.add(base, rest, compute)


def _dx(layer: Layer, G: Tracked) -> Tracked:
    """`H V`, formed as `H W + s (H B) A` or from V, with every error: each of its elements is one sum over rows."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    H = tr.cast(tr.multiply(G, layer.ratio[None, :], unit), compute)
    hB = tr.matmul(H, layer.lora_B, unit, output_unit=compute)
    update = tr.scale(tr.matmul(hB, layer.lora_A, unit, output_unit=compute), layer.scaling, compute)
    apart = tr.add(tr.matmul(H, layer.weight, unit, output_unit=compute), update, compute)
    delta = tr.scale(tr.matmul(layer.lora_B, layer.lora_A, unit, output_unit=compute), layer.scaling, compute)
    formed = tr.matmul(H, tr.add(layer.weight, delta, compute), unit, output_unit=compute)
    return tr.either(apart, formed)


def _with_calm_adapter(layer: Layer) -> Layer:
    """The layer whose A, B, n and c have kept their guards and given up their variances."""
    calm = (tr.calm(t) for t in (layer.lora_A, layer.lora_B, layer.norm, layer.ratio))
    A, B, norm, ratio = calm
    return Layer(layer.weight, layer.bias, A, B, norm, ratio, layer.scaling, layer.precision, layer.d9)


def _adapter_variance(layer: Layer, x: Array) -> Array:
    """What the errors of A and B do to each y0: `s^2 ((x^2 varA') B^2' + (x A')^2 varB')`."""
    A, B = layer.lora_A, layer.lora_B
    from_A = tr.spread(tr.spread(x**2, A.variance.T), B.value.T**2)
    return layer.scaling**2 * (from_A + tr.spread((x @ A.value.T) ** 2, B.variance.T))


def _shared_in_magnitude(layer: Layer, D: Array) -> Array:
    """From A, B and n: `(s^2 sum_j D^2 (B^2 varA) + s^2 sum_r varB (D A')^2 + dm^2 varn) / n^2`; no claim as for c."""
    A, B, n, s = layer.lora_A, layer.lora_B, layer.norm, layer.scaling
    from_A = np.sum(tr.times(D**2, tr.spread(B.value**2, A.variance)), axis=1)
    from_B = np.sum(tr.times((D @ A.value.T) ** 2, B.variance), axis=1)
    V = layer.weight.value + s * B.value @ A.value
    low = np.where(n.value > tr.limit(n), n.value - tr.limit(n), 1.0)
    from_n = tr.times(np.square(np.sum(D * V, axis=1) / low), n.variance)
    return np.where(layer.ratio.no_claim, np.inf, (s**2 * (from_A + from_B) + from_n) / low**2)


def _shared_in_lora_b(layer: Layer, D: Array) -> Array:
    """From A and c: `s^2 (c^2 D^2 varA' + varc (D A')^2)`."""
    A, c = layer.lora_A, layer.ratio
    from_A = tr.times(c.value[:, None] ** 2, tr.spread(D**2, A.variance.T))
    return layer.scaling**2 * (from_A + tr.times(c.variance[:, None], (D @ A.value.T) ** 2))


def _shared_in_lora_a(layer: Layer, D: Array) -> Array:
    """From B and c: `s^2 (c^2 varB + varc B^2)' D^2`."""
    B, c = layer.lora_B, layer.ratio
    rows = tr.times(c.value[:, None] ** 2, B.variance) + tr.times(c.variance[:, None], B.value**2)
    return layer.scaling**2 * tr.spread(rows.T, D**2)


def _direct_norm(V: Tracked, unit: float) -> Tracked:
    """`||V||` by rows from a rounded V. By the triangle inequality it is off by `||error of V||` at most.

    To first order the error is `<V, e> / n`; the next order, `||e||^2 / (2 n)`, has a mean, which is counted too.
    """
    n, noise = np.linalg.norm(V.value, axis=1), np.sum(V.variance, axis=1)
    n_safe = np.where(n == 0, 1.0, n)
    first = np.sum(V.value**2 * V.variance, axis=1) / n_safe**2 + np.square(noise / (2 * n_safe))
    variance = np.where(n == 0, noise, np.minimum(first, noise))
    squares = tr.total(tr.multiply(tr.exact(V.value), tr.exact(V.value), unit), 1, unit)
    variance += squares.variance / (4 * n_safe**2) + np.square(unit * n) / 3
    off = np.linalg.norm(V.guard, axis=1)
    terms = V.shape[1] + 2  # n products and n - 1 sums under the root, the root, and a scaling's remainder
    return Tracked(n, variance, off + terms * unit / (1 - terms * unit) * (n + off))


def _factored_square(weight: Tracked, A: Tracked, B: Tracked, *, scaling: float, unit: float) -> tuple[Tracked, Array]:
    """D13: `||W||^2 + 2 s <W A', B> + s^2 <B (A A'), B>` by rows, and the sum of the absolute terms."""
    base = tr.total(tr.multiply(weight, weight, unit), 1, unit)
    cross = tr.total(tr.multiply(tr.matmul(weight, A.T, unit), B, unit), 1, unit)
    delta = tr.total(tr.multiply(tr.matmul(B, tr.matmul(A, A.T, unit), unit), B, unit), 1, unit)
    cross, delta = tr.scale(cross, 2 * scaling, unit), tr.scale(delta, scaling**2, unit)
    terms = np.abs(base.value) + np.abs(cross.value) + np.abs(delta.value)
    return tr.add(tr.add(base, cross, unit), delta, unit), terms


def _norm_variance(weight: Array, lora_A: Tracked, lora_B: Tracked, *, scaling: float, unit: float) -> Array:
    """What the errors of A, B and s do to n: `dn_i = <V_i, s dB_i A + s B_i dA + ds (BA)_i> / n_i`."""
    A, B = lora_A.value, lora_B.value
    V = weight + scaling * B @ A
    n_square = np.sum(V**2, axis=1)
    from_B = np.sum(tr.times(lora_B.variance, (V @ A.T) ** 2), axis=1)
    from_A = np.sum(tr.times(V**2, tr.spread(B**2, lora_A.variance)), axis=1)
    held = tr.representable(np.array([scaling]), unit)[0]
    from_s = 0.0 if held else unit**2 / 3 * np.sum(V * (B @ A), axis=1) ** 2
    moved = scaling**2 * (from_A + from_B + from_s)
    return np.where(moved == 0, 0.0, moved / np.where(n_square == 0, 1.0, n_square))
