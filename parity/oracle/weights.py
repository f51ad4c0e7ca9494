"""The weight that a forward multiplies by (D6): as stored, or coded in four bits and read back; then cast to compute."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.case import Case
from ref import quant

PROFILE = "bnb-cpu"
"""The encode profile of the device that the ranks run on (Q5)."""


def weight_used(case: Case, weight: np.ndarray) -> Array:
    """W_used in float64, (out, in)."""
    held = jnp.asarray(weight)
    if case.base == "nf4":
        packed, state = quant.encode(held, profile=PROFILE, nested=True)
        held = quant.decode(packed, state, dtype=jnp.dtype("float32"))
    if case.compute != "float64":
        held = held.astype(case.compute)
    return held.astype(jnp.float64)
