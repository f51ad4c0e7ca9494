"""Numbers that carry how far a rounded computation of them may lie off: the arithmetic under every `bound`.

A `Tracked` array is (value, variance, guard). `value` is float64; the other two speak of the error that a computation
in a narrower format makes on the way to it:

- `guard` is rigorous: `|computed - value| <= guard`, whatever the data and whatever the order of the sums. Dot
  products use `gamma_n = n u / (1 - n u)` (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1).
- `variance` is the model of Higham and Mary (A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
  Comput. 41(5), 2019): each rounding is independent of the others and uniform, `v (1 + d)`, `d` in [-u, u], so it
  adds `u^2 v^2 / 3`. A sum of n terms t rounds its n - 1 partial sums; over random orders their squares add up to
  `n/3 (sum t)^2 + n/6 sum t^2` on average. A dot product rounds its products too, `sum t^2`.

`limit` gates at 16 standard deviations, and at the guard where that is smaller. Nothing here is fitted: the derivation
is docs/tolerances.md. What the variance assumes is that roundings are independent; where one rounded number enters many
sums (a row's ratio, an adapter's element), `layers` adds up its effect coherently instead of pretending that it is many
numbers, and `repeats` does the same for tokens that are equal.

An element whose variance is infinite has **no claim**: the mathematics says nothing about it (a quotient by a number
that may be zero, a ReLU whose sign may flip), so its limit is infinite, and so is that of all it touches. Nothing
touched by an exact zero is touched: 0 times no claim is 0.

Axis letters as everywhere: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

GATE = 16.0
"""Standard deviations at which a bound gates. A sum of independent uniform errors passes 16 with probability below
1e-55 (Chernoff); what the number really covers is that roundings are not quite independent (docs/tolerances.md, 2)."""


@dataclass(frozen=True)
class Tracked:
    """A float64 array and the error of a computation of it in a narrower format."""

    value: Array
    """What exact arithmetic gives, in float64."""
    variance: Array
    """The variance of the computed number's error under independent uniform roundings; infinite: no claim."""
    guard: Array
    """A rigorous bound on the computed number's error."""

    @property
    def no_claim(self) -> npt.NDArray[np.bool_]:
        """Where the mathematics promises nothing, as against a promise that is merely wide."""
        return np.isinf(self.variance)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that value, variance and guard share."""
        return self.value.shape

    @property
    def T(self) -> Tracked:  # noqa: N802 (numpy's name)
        """The transpose."""
        return Tracked(self.value.T, self.variance.T, self.guard.T)

    def __getitem__(self, index: object) -> Tracked:
        """The same elements of all three arrays."""
        return Tracked(self.value[index], self.variance[index], self.guard[index])


def exact(value: npt.ArrayLike) -> Tracked:
    """An input: both sides hold the very same number."""
    array = np.asarray(value, dtype=np.float64)
    return Tracked(array, np.zeros_like(array), np.zeros_like(array))


def limit(tracked: Tracked) -> Array:
    """How far a computed element may lie off: 16 standard deviations, or the rigorous guard where that is smaller.

    Returns:
        float64, the shape of `tracked`; infinite where there is no claim, 0 where the computation is exact.
    """
    return np.minimum(GATE * np.sqrt(tracked.variance), np.where(tracked.no_claim, np.inf, tracked.guard))


def difference(one: Tracked, other: Tracked) -> Tracked:
    """What separates two computations of one number, each with its own roundings: the errors add up.

    Raises:
        ValueError: where the two are not computations of the same shape.
    """
    if one.shape != other.shape:
        raise ValueError(f"shapes {one.shape} and {other.shape} differ: give two computations of one tensor")
    return Tracked(one.value, one.variance + other.variance, one.guard + other.guard)


def either(one: Tracked, *others: Tracked) -> Tracked:
    """The same number by one route or another: the larger variance and the larger guard, element by element."""
    variance, guard = one.variance, one.guard
    for other in others:
        variance, guard = np.maximum(variance, other.variance), np.maximum(guard, other.guard)
    return Tracked(one.value, variance, guard)


def calm(tracked: Tracked) -> Tracked:
    """The same number without its variance, guard kept: for a number whose error is added up coherently elsewhere."""
    return replace(tracked, variance=np.zeros_like(tracked.variance))


def stirred(tracked: Tracked, variance: Array) -> Tracked:
    """The same number with more variance: what was added up coherently elsewhere."""
    return replace(tracked, variance=tracked.variance + variance)


def cast(a: Tracked, unit: float) -> Tracked:
    """One rounding to the format of this unit roundoff; an exact number that the format holds is not rounded."""
    kept = (a.guard == 0) & representable(a.value, unit)
    rounding = np.where(kept, 0.0, np.square(unit * a.value) / 3)
    return Tracked(a.value, a.variance + rounding, a.guard + np.where(kept, 0.0, unit * (np.abs(a.value) + a.guard)))


def representable(value: Array, unit: float) -> npt.NDArray[np.bool_]:
    """Whether the format of unit roundoff `2^-p` holds the number (its range apart): p significant bits suffice."""
    mantissa, _ = np.frexp(value)
    scaled = mantissa / unit
    return scaled == np.rint(scaled)


def add(a: Tracked, b: Tracked, unit: float) -> Tracked:
    """`a + b`, rounded once."""
    return _rounded(a.value + b.value, a.variance + b.variance, a.guard + b.guard, unit=unit)


def subtract(a: Tracked, b: Tracked, unit: float) -> Tracked:
    """`a - b`, rounded once."""
    return _rounded(a.value - b.value, a.variance + b.variance, a.guard + b.guard, unit=unit)


def multiply(a: Tracked, b: Tracked, unit: float) -> Tracked:
    """`a * b` element by element, rounded once, but not where b is exactly 0 or a power of two."""
    variance = times(a.variance, b.value**2) + times(a.value**2, b.variance) + times(a.variance, b.variance)
    size_a, size_b = np.abs(a.value), np.abs(b.value)
    guard = times(a.guard, size_b) + times(size_a, b.guard) + times(a.guard, b.guard)
    rounded = _rounded(a.value * b.value, variance, guard, unit=unit)
    if b.guard.all():
        return rounded
    shifts = _only_shifts(b)
    return Tracked(rounded.value, np.where(shifts, variance, rounded.variance), np.where(shifts, guard, rounded.guard))


def square(a: Tracked, unit: float) -> Tracked:
    """`a * a`, rounded once: both factors carry the same error."""
    variance = 4 * times(a.value**2, a.variance) + 2 * times(a.variance, a.variance)
    guard = 2 * times(np.abs(a.value), a.guard) + times(a.guard, a.guard)
    return _rounded(a.value**2, variance, guard, unit=unit)


def scale(a: Tracked, factor: float, unit: float) -> Tracked:
    """`factor * a`. A power of two rounds nothing; a factor that the format does not hold is itself off by `u`."""
    if factor == 0:
        return exact(np.zeros(a.shape))
    scaled = Tracked(factor * a.value, factor**2 * a.variance, abs(factor) * a.guard)
    if abs(math.frexp(factor)[0]) == 0.5:  # noqa: PLR2004 (the mantissa of a power of two)
        return scaled
    if not representable(np.array([factor]), unit)[0]:
        scaled = _rounded(scaled.value, scaled.variance, scaled.guard, unit=unit)
    return _rounded(scaled.value, scaled.variance, scaled.guard, unit=unit)


def divide(a: Tracked, b: Tracked, unit: float) -> Tracked:
    """`a / b`, rounded once; 0 where b is exactly zero (D7), no claim where b may be zero.

    A divisor that reaches down to `low = |b| - limit(b)` amplifies errors by `1 / low`, not `1 / |b|`: to first order
    the same, and valid as far as the gate reaches.
    """
    size, zero = np.abs(b.value), (b.value == 0) & (b.guard == 0)
    reach = limit(b)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(b.value == 0, 0.0, a.value / b.value)
        variance = (a.variance + times(quotient**2, b.variance)) / np.square(size - reach)
        guard = (a.guard + times(np.abs(quotient), b.guard)) / (size - b.guard)
    rounded = _rounded(quotient, variance, guard, unit=unit)
    variance = np.where(reach < size, rounded.variance, np.inf)
    guard = np.where(b.guard < size, rounded.guard, np.inf)
    return Tracked(quotient, np.where(zero, 0.0, variance), np.where(zero, 0.0, guard))


def sqrt(a: Tracked, unit: float) -> Tracked:
    """The square root of a number that is not negative, rounded once; an error `e` becomes `e / (r + r_low)`."""
    root = np.sqrt(a.value)
    reach = np.sqrt(np.maximum(a.value - limit(a), 0.0))
    floor = np.sqrt(np.maximum(a.value - a.guard, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where(a.variance == 0, 0.0, a.variance / np.square(root + reach))
        guard = np.where(a.guard == 0, 0.0, a.guard / (root + floor))
    return _rounded(root, variance, guard, unit=unit)


def total(a: Tracked, axis: int, unit: float) -> Tracked:
    """The sum over one axis, in any order."""
    terms = a.shape[axis]
    value, squares = np.sum(a.value, axis=axis), np.sum(a.value**2, axis=axis)
    variance = np.sum(a.variance, axis=axis) + partial_sums(value, squares, terms=terms, unit=unit)
    guard = np.sum(a.guard, axis=axis)
    guard = guard + _gamma(max(terms - 1, 0), unit) * (np.sum(np.abs(a.value), axis=axis) + guard)
    return Tracked(value, variance, guard)


def matmul(a: Tracked, b: Tracked, unit: float, *, output_unit: float | None = None) -> Tracked:
    """`a @ b` of two matrices: products and sums rounded to `unit` in any order, the result then to `output_unit`.

    `output_unit` is wider than `unit` where a narrow product accumulates wide: bf16 rounds its output, sums in float32.

    Source: the dot product's variance `u^2/3 (n/3 (sum t)^2 + n/6 sum t^2 + sum t^2)`, over random orders.
    """
    terms = a.shape[1]
    value, squares = a.value @ b.value, a.value**2 @ b.value**2
    variance = partial_sums(value, squares, terms=terms, unit=unit) + unit**2 / 3 * squares
    variance += spread(a.variance, b.value**2) + spread(a.value**2, b.variance) + spread(a.variance, b.variance)
    size_a, size_b = np.abs(a.value), np.abs(b.value)
    guard = spread(a.guard, size_b) + spread(size_a, b.guard) + spread(a.guard, b.guard)
    guard = guard + _gamma(terms, unit) * (size_a @ size_b + guard)
    return narrowed(Tracked(value, variance, guard), unit, output_unit)


def narrowed(a: Tracked, unit: float, output_unit: float | None) -> Tracked:
    """The same number rounded once more where `output_unit` is wider than the `unit` that it was computed at."""
    if output_unit is None or output_unit <= unit:
        return a
    return _rounded(a.value, a.variance, a.guard, unit=output_unit)


def summed(a: Tracked, squares: Array, *, terms: int, unit: float) -> Tracked:
    """The same number by another route: one long sum of terms whose squares add up to `squares`, each rounded once.

    For a derivative that is read off a loss: every term of the loss takes part, most of them with a zero.
    """
    variance = partial_sums(a.value, squares, terms=terms, unit=unit) + unit**2 / 3 * squares
    reach = np.sqrt(terms * squares)  # of the absolute terms, by Cauchy and Schwarz
    return Tracked(a.value, a.variance + variance, a.guard + _gamma(terms + 1, unit) * reach)


def mean(parts: list[Tracked], unit: float, *, world: int, coherent: bool = False) -> Tracked:
    """The sum of the parts over `world`, each divided before or after the sum, in any order (gloo, a ring, a tree).

    Args:
        parts: one a rank, or one a forward of each rank.
        unit: the unit roundoff of the reduction.
        world: the number of ranks.
        coherent: whether the parts' errors may be the same, so that they add up: k parts are worth k^2 variances.
    """
    if len(parts) == world == 1:
        return parts[0]
    stacked = Tracked(*(np.stack([getattr(p, name) for p in parts]) for name in ("value", "variance", "guard")))
    if coherent:
        stacked = replace(stacked, variance=len(parts) * stacked.variance)
    return either(total(scale(stacked, 1 / world, unit), 0, unit), scale(total(stacked, 0, unit), 1 / world, unit))


def joined(parts: list[Tracked]) -> Tracked:
    """One after the other along the first axis."""
    return Tracked(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("value", "variance", "guard")))


def reshaped(a: Tracked, shape: tuple[int, ...]) -> Tracked:
    """The same elements in another shape."""
    return Tracked(a.value.reshape(shape), a.variance.reshape(shape), a.guard.reshape(shape))


def times(a: Array, b: Array) -> Array:
    """`a * b` of numbers that are not negative, where 0 times infinity is 0: an exact zero is touched by nothing."""
    with np.errstate(invalid="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, a * b)


def spread(a: Array, b: Array) -> Array:
    """`a @ b` of numbers that are not negative, where 0 times infinity is 0."""
    endless_a, endless_b = np.isinf(a), np.isinf(b)
    if not (endless_a.any() or endless_b.any()):
        return a @ b
    finite = np.where(endless_a, 0.0, a) @ np.where(endless_b, 0.0, b)
    touched = endless_a.astype(np.float64) @ (b > 0) + (a > 0).astype(np.float64) @ endless_b
    return np.where(touched > 0, np.inf, finite)


def partial_sums(value: Array, squares: Array, *, terms: int, unit: float) -> Array:
    """The variance of the roundings of a sum's partial sums, over random orders of its terms."""
    return unit**2 / 3 * (terms / 3 * value**2 + terms / 6 * squares) if terms > 1 else np.zeros_like(value)


def _rounded(value: Array, variance: Array, guard: Array, *, unit: float) -> Tracked:
    return Tracked(value, variance + np.square(unit * value) / 3, guard + unit * (np.abs(value) + guard))


def _only_shifts(a: Tracked) -> npt.NDArray[np.bool_]:
    """Where a number is exactly 0 or a power of two: a product with it rounds nothing."""
    mantissa = np.abs(np.frexp(a.value)[0])
    return (a.guard == 0) & ((mantissa == 0.5) | (mantissa == 0))  # noqa: PLR2004 (the mantissa of a power of two)


def _gamma(terms: int, unit: float) -> float:
    return terms * unit / (1 - terms * unit)
