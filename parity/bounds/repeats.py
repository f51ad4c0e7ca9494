"""Tokens that repeat: which of them carry the same numbers, and what that does to a sum over tokens.

The variances of `tracked` add up roundings as if each were independent. Two tokens with the same numbers are rounded
alike, so that their errors add up: k of them are worth `(k sigma)^2` and not `k sigma^2`. With the groups g of like
tokens, an error e of one factor that meets the other factor w in `sum_t w_t e_t` has the variance

    sum_g var(e_g) max((sum_{t in g} w_t)^2, sum_{t in g} w_t^2)

which holds for every correlation from 0 to 1 within a group, since it is linear in it. A partial sum is rounded by what
the next term leaves below its last place: like terms leave the same, so the n - 1 roundings of a sum are worth
`sum_g k_g^2 / n` times as much, the mean number of tokens like a token. (docs/tolerances.md, 3.)

**Like** are tokens whose rows are equal, or nearly so: within `closeness` of each other in the 2-norm, relative to
their length, directly or through others. A group that is too large only widens the bound.

Axes: T tokens, I in, O out, M and N the columns of two matrices that are multiplied over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from parity.bounds import tracked as tr
from parity.bounds.tracked import Array, Tracked
from parity.errors import ParityError

Ids: TypeAlias = npt.NDArray[np.intp]
"""(tokens,): the number of each token's group."""

COHERENCE: Final = 4.0
"""Largest `coherence` of tokens that do not repeat: the standard deviation is then at most twice the predicted one, so
that the gate of 16 stands at 8 of the true ones, which a sum of independent errors passes with probability below 3e-14
(docs/tolerances.md, 2)."""


class InputsNotIndependent(ParityError):
    """Tokens that are too much alike for a bound that takes their roundings as independent."""


@dataclass(frozen=True)
class Repeats:
    """Which tokens are alike in x, and which in the cotangent of the output, at every layer of a stack.

    A mask or a ReLU may tell tokens apart on the way. They stay in one group, since the errors that they share do.
    """

    inputs: Ids
    cotangents: Ids

    def __getitem__(self, part: slice) -> Repeats:
        """The same of a part of the tokens."""
        return Repeats(self.inputs[part], self.cotangents[part])

    @property
    def multiplicity(self) -> Array:
        """(T,): how many tokens are like this one in both, itself included."""
        ids = joined(self.inputs, self.cotangents)
        return np.bincount(ids)[ids].astype(np.float64)


def closeness(tokens: int, *, unit: float, compute_unit: float) -> float:
    """The relative distance below which two tokens are rounded alike.

    A rounding to `compute_unit` moves on by a whole place where its operand moves by 2 compute_unit; a partial sum of
    T like terms keeps places of 2 unit times its own size, up to T times the term's.
    """
    return 2 * max(compute_unit, tokens * unit)


def alike(rows: Array, share: float) -> Ids:
    """Groups of the rows (tokens, features) that lie within `share` of each other, relative to the longer one."""
    squares = np.sum(rows**2, axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    resolution = 2.0**-44  # of a difference of float64 squares: rows equal to the bit may seem this far apart
    near = distances <= (share**2 + resolution) * np.maximum(squares[:, None], squares[None, :])
    ids = np.arange(len(rows))
    while True:
        reached = np.min(np.where(near, ids[None, :], len(rows)), axis=1)
        if np.array_equal(reached, ids):
            return _numbered(ids[:, None])
        ids = reached


def joined(*ids: Ids) -> Ids:
    """Groups of the tokens that are together in each of these."""
    return _numbered(np.stack(ids, axis=1))


def coherence(x: Array, G: Array, ids: Ids) -> float:
    """`||sum_g D_g||^2 / sum_g ||D_g||^2` of the groups' outer products `D_g = sum_{t in g} G_t x_t'`.

    It is 1 on average for groups that are independent of each other, and their number if all are the same.
    """
    products = (x @ x.T) * (G @ G.T)
    within = float(np.sum(products[ids[:, None] == ids[None, :]]))
    return float(np.sum(products)) / within if within > 0 else 1.0


def require_independent(x: Array, G: Array, *, ids: Ids | None = None, place: str = "the stack") -> None:
    """Refuse tokens that are correlated with each other: nothing here bounds the covariance of different tokens.

    Args:
        x: (tokens, in) of all ranks: what a layer reads.
        G: (tokens, out), the cotangent of its output.
        ids: the groups of tokens whose covariance is bounded; by default each token is on its own.
        place: the layer, for the message.

    Raises:
        InputsNotIndependent: where the `coherence` of x and G is above `COHERENCE`.
    """
    found = coherence(x, G, np.arange(len(x)) if ids is None else ids)
    if found > COHERENCE:
        raise InputsNotIndependent(
            f"the tokens of {place}, x {x.shape} and G {G.shape}, add up as if {found:.3g} were one, "
            f"above {COHERENCE:g}",
            hint="take away the mean over tokens that x or G has, or give G random signs",
        )


def product(a: Tracked, b: Tracked, repeats: Repeats | None, *, unit: float, output_unit: float) -> Tracked:
    """`a' b` over tokens, of a (T, M) on the cotangent's side and b (T, N) on the input's; rounded as `tr.matmul`."""
    if repeats is None:
        return tr.matmul(a.T, b, unit, output_unit=output_unit)
    independent, alike_to = tr.matmul(a.T, b, unit), repeats.multiplicity
    squares = a.value.T**2 @ b.value**2
    sums = tr.partial_sums(independent.value, squares, terms=len(alike_to), unit=unit)
    variance = np.mean(alike_to) * sums + unit**2 / 3 * ((a.value**2 * alike_to[:, None]).T @ b.value**2)
    from_a, weight_b = _by_group(a.variance, b.value, repeats.cotangents)
    from_b, weight_a = _by_group(b.variance, a.value, repeats.inputs)
    variance += tr.spread(from_a.T, weight_b) + tr.spread(weight_a.T, from_b)
    variance += tr.spread(tr.times(a.variance, alike_to[:, None]).T, b.variance)
    return tr.narrowed(Tracked(independent.value, variance, independent.guard), unit, output_unit)


def inner(a: Tracked, b: Tracked, repeats: Repeats | None, *, unit: float, output_unit: float) -> Tracked:
    """`sum_t a * b`, (M,), of two matrices (T, M): the product is rounded to both units, then summed in any order."""
    products = tr.cast(tr.multiply(a, b, unit), output_unit)
    independent = tr.total(products, 0, unit)
    if repeats is None:
        return independent
    squares, tokens = np.sum(products.value**2, axis=0), len(repeats.inputs)
    sums = tr.partial_sums(independent.value, squares, terms=tokens, unit=unit)
    variance = np.mean(repeats.multiplicity) * sums + _terms(a, b, repeats, unit=unit, output_unit=output_unit)
    return Tracked(independent.value, variance, independent.guard)


def whole(a: Tracked, b: Tracked, repeats: Repeats | None, *, unit: float) -> Tracked:
    """`sum(a * b)`, a scalar, of two matrices (T, M): products and sums are rounded to `unit`, in any order."""
    products = tr.multiply(a, b, unit)
    flat = Tracked(products.value.ravel(), products.variance.ravel(), products.guard.ravel())
    independent = tr.total(flat, 0, unit)
    if repeats is None:
        return independent
    squares = np.sum(flat.value**2)
    sums = tr.partial_sums(independent.value, squares, terms=len(flat.value), unit=unit)
    variance = np.mean(repeats.multiplicity) * sums + np.sum(_terms(a, b, repeats, unit=unit, output_unit=unit))
    return Tracked(independent.value, variance, independent.guard)


def _terms(a: Tracked, b: Tracked, repeats: Repeats, *, unit: float, output_unit: float) -> Array:
    """(M,): the variance of `sum_t a * b` but for the roundings of the sum itself."""
    alike_to = repeats.multiplicity[:, None]
    rounding = tr.cast(tr.multiply(tr.exact(a.value), tr.exact(b.value), unit), output_unit).variance
    variance = np.sum(alike_to * (rounding + tr.times(a.variance, b.variance)), axis=0)
    for side, other, ids in ((a, b, repeats.cotangents), (b, a, repeats.inputs)):
        own, weight = _by_group(side.variance, other.value, ids)
        variance += np.sum(tr.times(own, weight), axis=0)
    return variance


def _by_group(variance: Array, weight: Array, ids: Ids) -> tuple[Array, Array]:
    """Of each group the largest variance, and the larger of the weights' sum squared and the sum of their squares."""
    groups = int(ids.max()) + 1
    largest, sums, squares = (np.zeros((groups, columns)) for columns in (variance.shape[1], *2 * weight.shape[1:]))
    np.maximum.at(largest, ids, variance)
    np.add.at(sums, ids, weight)
    np.add.at(squares, ids, weight**2)
    return largest, np.maximum(sums**2, squares)


def _numbered(rows: npt.NDArray[np.generic]) -> Ids:
    """Equal rows get the same number."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
