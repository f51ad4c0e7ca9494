"""The weight that a forward multiplies by (D6): as stored, or coded in four bits and read back; then cast."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.case import Case
from ref import quant

BLOCKSIZE = 64
"""Elements that share an absmax (Q1)."""

PROFILE = "bnb-cpu"
"""The encode profile of the device that the ranks run on (Q5)."""


def weight_used(case: Case, weight: np.ndarray, *, offset: float | None = None) -> Array:
    """W_used in float64, (out, in).

    `offset` is what was taken off the scales before they were coded (Q6). It is data (Q4): bitsandbytes' mean depends
    on the order in which torch sums. Where none is given it is the mean, rounded once.
    """
    held = jnp.asarray(weight)
    if case.base == "nf4":
        packed, state = quant.encode(held, profile=PROFILE, nested=True, offset=offset)
        held = quant.decode(packed, state, dtype=jnp.dtype("float32"))
    if case.compute != "float64":
        held = held.astype(case.compute)
    return held.astype(jnp.float64)


def offset_and_bound(weight: np.ndarray) -> tuple[float, float]:
    """The mean of the blocks' absmax, and how far a float32 mean of them may lie off in any order of summation.

    The rigorous bound of a sum of n positive numbers: (n - 1) u relative, and one more rounding for the division
    (Higham, Accuracy and Stability, section 4.2).
    """
    blocks = np.abs(np.pad(weight.ravel(), (0, -weight.size % BLOCKSIZE))).reshape(-1, BLOCKSIZE)
    absmax = blocks.max(axis=1).astype(np.float64)
    return float(absmax.mean()), len(absmax) * 2.0**-24 * float(absmax.mean())
