"""The norm of V's rows on tracked numbers, directly or factored (D3, D4, D13).

    V = W + s B A        n = ||V||

The factored norm counts only where the terms it sums are at most `CANCELLATION` times the square they leave; elsewhere
D13's guard demands the direct form, and the bound demands its accuracy. Axes: I in, O out, R rank.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.tracked import Array, Tracked

CANCELLATION: Final = 2.0**10
"""D13: the factored norm may lose this factor, 10 of float32's 24 bits, to cancellation; beyond it the direct form
is demanded. `ref.dora.guarded_rows` and its like guard earlier, so that the bound covers every row they factor."""


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
