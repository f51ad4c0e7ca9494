"""D9 on tracked numbers: what dropout multiplies by, and the ways to take its three-part sums.

    y = x W' + (c - 1) (u W') + c s (u A') B' + b,        dx = G W + mask * (H V - G W),        u = mask * x

Where it keeps, a mask holds `1 / (1 - p)`, which the format may not hold. That rounding is one number for all that is
kept: it moves u, and with it all that is linear in u, by one and the same share, the mask's **slip**. So the products
run on a calm mask, and the variance `slip * value^2` is added once to each result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.tracked import Array, Tracked


@dataclass(frozen=True)
class Mask:
    """What a layer's dropout multiplies its input by."""

    factor: Tracked
    """0 or 1 / (1 - p), (tokens, in), cast to the compute format; calm."""
    slip: float
    """The variance of the relative error that all kept factors share; 0 where the format holds them."""


def as_mask(factor: Array, compute_unit: float) -> Mask:
    """The mask in the compute format."""
    held = tr.cast(tr.exact(factor), compute_unit)
    kept = factor != 0
    slip = np.max(held.variance[kept] / factor[kept] ** 2, initial=0.0)
    return Mask(tr.calm(held), float(slip))


def dropped(x: Tracked, mask: Mask, compute_unit: float) -> Tracked:
    """`mask * x`, rounded once but where the factor is 0 or a power of two."""
    return tr.multiply(x, mask.factor, compute_unit)


def in_any_order(base: Tracked, part: Tracked, rest: Tracked, unit: float) -> Tracked:
    """`base + part + rest`, by any of the three ways to add two of them first."""
    return tr.either(
        tr.add(tr.add(base, part, unit), rest, unit),
        tr.add(base, tr.add(part, rest, unit), unit),
        tr.add(tr.add(base, rest, unit), part, unit),
    )


def less_whole(G: Tracked, ratio: Tracked, less_one: Tracked, unit: float) -> Tracked:
    """`H - G` with `H = G c`: as `G (c - 1)`, or by subtraction, which has the rounding of H as well."""
    outright = tr.multiply(G, less_one, unit)
    H = tr.multiply(G, ratio, unit)
    rounds = (ratio.value != 1) | (ratio.guard > 0)
    extra = np.where(rounds, np.square(unit * H.value) / 3, 0.0)
    guard = np.where(rounds, unit * (np.abs(H.value) + H.guard), 0.0)
    return Tracked(outright.value, outright.variance + extra, outright.guard + guard)
