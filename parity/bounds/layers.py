"""One DoRA layer, forward and backward, on tracked numbers: the error of its output and of its three gradients.

    V = W + s B A        n = ||V||        c = m / n        u = mask * x (D9; x itself without dropout)
    y0 = u W' + s (u A') B'               y = c y0 + b, with dropout x W' + (c - 1) (u W') + c s (u A') B' + b
    H = G c              dm = sum_t(G y0) / n              dB = s H' (u A')               dA = s (H B)' u
    dx = H V, with dropout G W + mask * (H V - G W)

(ref/SPEC.md, D1 to D9, D13 and G1.) Without a magnitude (LoRA) c is exactly 1, and nothing is rounded by it.
Axes: T tokens, I in, O out, R rank.

Where implementations may choose, `either` takes the larger error of the routes: `y0` and `dx` with V formed or not, dA
and dB with the gradient of V formed or not, `n` directly or factored, and what `dropout` lists.

**Coherent errors.** The error of one element of A, B or c enters the sum over tokens with every token, so there it
does not average out. With `D = G' u` (out, in), to first order,

    dm_i = <D_i, V_i> / n_i        dB_ir = s c_i <D_i, A_r>        dA_rj = s sum_i c_i B_ir D_ij

and the variances of A, B and c are added through these, while the products themselves run on calm operands. The norm
is treated alike. Tokens that repeat add up coherently too: that is `repeats`. Guards need no such care: they bound
absolute errors, however correlated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from parity.bounds import dropout
from parity.bounds import tracked as tr
from parity.bounds.norm import weight_norm
from parity.bounds.repeats import inner, product

if TYPE_CHECKING:
    from parity.bounds.dropout import Mask
    from parity.bounds.repeats import Repeats
    from parity.bounds.tracked import Array, Tracked


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
    magnitude: Tracked | None
    """(out,); None in LoRA."""


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
    formed: Tracked
    """V formed in the compute format, (out, in)."""
    formed_calm: Tracked
    """The same with its own roundings alone."""
    norm: Tracked | None
    """n, (out,); None in LoRA."""
    ratio: Tracked
    """c, (out,); exactly 1 in LoRA."""
    scaling: float
    """s."""
    precision: Precision
    """The formats."""
    d9: bool
    """Whether y may be formed as PEFT forms it (D9): `x W' + (c - 1) x W' + c s (x A') B'`, in the compute format."""


@dataclass(frozen=True)
class Read:
    """What a layer's backward reads of its forward."""

    u: Tracked
    """What the adapter reads, (tokens, in): x, or with dropout mask * x."""
    kept: Tracked
    """`u W'`, (tokens, out), calm: with its own roundings alone."""
    update: Tracked
    """`s (u A') B'`, (tokens, out), calm."""
    y0: Tracked
    """Their sum, calm: to dm, `backward` adds coherently what the adapter's errors do."""
    mask: Mask | None
    """Dropout's."""


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
    norm, ratio = None, tr.exact(np.ones(weight.shape[0]))
    if adapter.magnitude is not None:
        norm = weight_norm(weight, adapter.lora_A, adapter.lora_B, scaling=scaling, unit=precision.unit)
        ratio = tr.divide(adapter.magnitude, norm, precision.unit)
    lora_A, lora_B = (tr.cast(t, precision.compute_unit) for t in (adapter.lora_A, adapter.lora_B))
    formed, formed_calm = (
        _formed(weight, *factors, scaling=scaling, precision=precision)
        for factors in ((lora_A, lora_B), (tr.calm(lora_A), tr.calm(lora_B)))
    )
    return Layer(weight, bias, lora_A, lora_B, formed, formed_calm, norm, ratio, scaling, precision, d9)


def _formed(weight: Tracked, A: Tracked, B: Tracked, *, scaling: float, precision: Precision) -> Tracked:
    """D2: `W + s B A` in the compute format."""
    delta = tr.matmul(B, A, precision.unit, output_unit=precision.compute_unit)
    return tr.add(weight, tr.scale(delta, scaling, precision.compute_unit), precision.compute_unit)


def merged(weight: Tracked, lora_A: Tracked, lora_B: Tracked, magnitude: Tracked, *, scaling: float) -> Tracked:
    """D10: `c * V` in float32, (out, in)."""
    unit = FLOAT32.unit
    norm = weight_norm(weight, lora_A, lora_B, scaling=scaling, unit=unit)
    V = tr.add(weight, tr.scale(tr.matmul(lora_B, lora_A, unit), scaling, unit), unit)
    return tr.multiply(V, tr.divide(magnitude, norm, unit)[:, None], unit)


def forward(layer: Layer, x: Tracked, mask: Mask | None = None) -> tuple[Read, Tracked]:
    """What the backward reads, and y (tokens, out) with every error."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    u = x if mask is None else dropout.dropped(x, mask, compute)
    kept, update, formed = _products(layer, u)
    y0 = tr.either(tr.add(kept, update, compute), formed)
    read = Read(u, kept, update, y0, mask)
    y = _output(layer, read) if mask is None else _dropped_output(layer, x, read)
    if layer.bias is not None:
        y = tr.add(y, layer.bias[None, :], unit)
    return read, tr.cast(y, compute)


def backward(layer: Layer, read: Read, G: Tracked, repeats: Repeats | None = None) -> tuple[Adapter, Tracked]:
    """The gradients of A, B and magnitude, and `dx` (tokens, in), for the cotangent `G` (tokens, out) of this rank."""
    own = _with_calm_adapter(layer)
    D = G.value.T @ read.u.value
    slip = 0.0 if read.mask is None else read.mask.slip
    dA, dB = _factor_gradients(own, read, G, repeats)
    gradients = Adapter(
        tr.stirred(dA, _shared_in_lora_a(layer, D) + slip * dA.value**2),
        tr.stirred(dB, _shared_in_lora_b(layer, D) + slip * dB.value**2),
        None,
    )
    if layer.norm is not None and own.norm is not None:
        dm = _magnitude_gradient(own, own.norm, (read, G), repeats)
        shared = _shared_in_magnitude(layer, layer.norm, D) + slip * dm.value**2
        gradients = Adapter(gradients.lora_A, gradients.lora_B, tr.stirred(dm, shared))
    return gradients, _dx(layer, G, read.mask)


def _products(layer: Layer, u: Tracked) -> tuple[Tracked, Tracked, Tracked]:
    """`u W'`, `s (u A') B'` and, formed otherwise, their sum `u V'`: all calm in the adapter."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    A, B = tr.calm(layer.lora_A), tr.calm(layer.lora_B)
    base = tr.matmul(u, layer.weight.T, unit, output_unit=compute)
    h = tr.matmul(u, A.T, unit, output_unit=compute)
    update = tr.scale(tr.matmul(h, B.T, unit, output_unit=compute), layer.scaling, compute)
    return base, update, tr.matmul(u, layer.formed_calm.T, unit, output_unit=compute)


def _output(layer: Layer, read: Read) -> Tracked:
    """D8: `c y0`, (tokens, out), before the bias; with `d9` also as PEFT has it."""
    unit = layer.precision.unit
    full = tr.stirred(read.y0, _adapter_variance(layer, read.u.value))
    y = tr.multiply(full, layer.ratio[None, :], unit)
    if not layer.d9:
        return y
    return tr.either(y, _in_compute_format(layer, read.kept, read, layer.ratio))


def _dropped_output(layer: Layer, x: Tracked, read: Read) -> Tracked:
    """D9: the sum of three, (tokens, out), before the bias; what the errors of A, B and c do is added coherently."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    c = tr.calm(layer.ratio)
    base = tr.matmul(x, layer.weight.T, unit, output_unit=compute)
    part = tr.multiply(read.kept, _less_one(c, unit)[None, :], unit)
    y = dropout.in_any_order(base, part, tr.multiply(read.update, c[None, :], unit), unit)
    if layer.d9:
        first = base if layer.bias is None else tr.add(base, layer.bias[None, :], compute)
        y = tr.either(y, _in_compute_format(layer, base, read, c), _in_compute_format(layer, first, read, c))
    slip = 0.0 if read.mask is None else read.mask.slip
    shared = tr.times(layer.ratio.value**2, _adapter_variance(layer, read.u.value))
    shared += tr.times(layer.ratio.variance[None, :], read.y0.value**2)
    return tr.stirred(y, shared + slip * np.square(y.value - base.value))


def _in_compute_format(layer: Layer, base: Tracked, read: Read, ratio: Tracked) -> Tracked:
    """D9 as PEFT has it: `base + ((c - 1) u W' + c s (u A') B')`, c and every sum in the compute format."""
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    less_one, c = (tr.cast(t, compute)[None, :] for t in (_less_one(ratio, unit), ratio))
    part, rest = tr.multiply(read.kept, less_one, compute), tr.multiply(read.update, c, compute)
    return tr.add(base, tr.add(part, rest, compute), compute)


def _less_one(ratio: Tracked, unit: float) -> Tracked:
    return tr.subtract(ratio, tr.exact(np.ones(ratio.shape)), unit)


def _factor_gradients(own: Layer, read: Read, G: Tracked, repeats: Repeats | None) -> tuple[Tracked, Tracked]:
    """`dA = s (H B)' u` and `dB = s H' (u A')`, or by way of `H' u`, the gradient of V; calm in the adapter."""
    unit, compute = own.precision.unit, own.precision.compute_unit
    A, B, s, formats = own.lora_A, own.lora_B, own.scaling, {"unit": unit, "output_unit": compute}
    H = tr.cast(tr.multiply(G, own.ratio[None, :], unit), compute)
    h, hB = tr.matmul(read.u, A.T, **formats), tr.matmul(H, B, **formats)
    dV = product(H, read.u, repeats, **formats)
    dA = tr.either(product(hB, read.u, repeats, **formats), tr.matmul(B.T, dV, **formats))
    dB = tr.either(product(H, h, repeats, **formats), tr.matmul(dV, A.T, **formats))
    return tr.scale(dA, s, compute), tr.scale(dB, s, compute)


def _magnitude_gradient(own: Layer, norm: Tracked, passed: tuple[Read, Tracked], repeats: Repeats | None) -> Tracked:
    """`dm = sum_t(G y0) / n`; with dropout autodiff sums the two parts of y0 apart. Calm in the adapter."""
    unit, compute = own.precision.unit, own.precision.compute_unit
    read, G = passed
    formats = {"unit": unit, "output_unit": compute}
    dc = inner(G, read.y0, repeats, **formats)
    if read.mask is not None:
        parts = (inner(G, part, repeats, **formats) for part in (read.kept, read.update))
        dc = tr.either(dc, tr.add(*parts, unit))
    return tr.divide(dc, norm, unit)


def _dx(layer: Layer, G: Tracked, mask: Mask | None) -> Tracked:
    """`H V`, formed as `H W + s (H B) A` or from V, with every error: each of its elements is one sum over rows.

    With dropout `G W + mask * (H V - G W)`, where `H - G` may stand for the two in the product with W.
    """
    unit, compute = layer.precision.unit, layer.precision.compute_unit
    formats = {"unit": unit, "output_unit": compute}
    H = tr.cast(tr.multiply(G, layer.ratio[None, :], unit), compute)
    hB = tr.matmul(H, layer.lora_B, **formats)
    update = tr.scale(tr.matmul(hB, layer.lora_A, **formats), layer.scaling, compute)
    formed = tr.matmul(H, layer.formed, **formats)
    if mask is None:
        return tr.either(tr.add(tr.matmul(H, layer.weight, **formats), update, compute), formed)
    whole = tr.matmul(G, layer.weight, **formats)
    less = tr.cast(dropout.less_whole(G, layer.ratio[None, :], _less_one(layer.ratio, unit)[None, :], unit), compute)
    apart = tr.add(tr.matmul(less, layer.weight, **formats), update, compute)
    through = dropout.dropped(tr.either(apart, tr.subtract(formed, whole, compute)), mask, compute)
    return tr.stirred(tr.add(whole, through, compute), mask.slip * through.value**2)


def _with_calm_adapter(layer: Layer) -> Layer:
    """The layer whose A, B, n and c have kept their guards and given up their variances."""
    A, B, ratio = (tr.calm(t) for t in (layer.lora_A, layer.lora_B, layer.ratio))
    norm = None if layer.norm is None else tr.calm(layer.norm)
    return replace(layer, lora_A=A, lora_B=B, norm=norm, ratio=ratio)


def _adapter_variance(layer: Layer, u: Array) -> Array:
    """What the errors of A and B do to each y0: `s^2 ((u^2 varA') B^2' + (u A')^2 varB')`."""
    A, B = layer.lora_A, layer.lora_B
    from_A = tr.spread(tr.spread(u**2, A.variance.T), B.value.T**2)
    return layer.scaling**2 * (from_A + tr.spread((u @ A.value.T) ** 2, B.variance.T))


def _shared_in_magnitude(layer: Layer, n: Tracked, D: Array) -> Array:
    """From A, B and n: `(s^2 sum_j D^2 (B^2 varA) + s^2 sum_r varB (D A')^2 + dm^2 varn) / n^2`; no claim as for c."""
    A, B, s = layer.lora_A, layer.lora_B, layer.scaling
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
