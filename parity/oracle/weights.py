"""The weight that a forward multiplies by (D6): as stored, or coded in four bits and read back; then cast."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from parity.case import Case
from ref import quant

BLOCKSIZE = 64
"""Elements that share an absmax (Q1)."""

CODES = ("nf4", "fp4")
"""The bases in four bits."""

PROFILE = "bnb-cpu"
"""The encode profile of the device that the ranks run on (Q5)."""


def weight_used(case: Case, weight: np.ndarray, *, offset: float | None = None) -> Array:
    """W_used in float64, (out, in).

    `offset` is what was taken off the scales before they were coded (Q6). It is data (Q4): bitsandbytes' mean depends
    on the order in which torch sums. Where none is given it is the mean, rounded once.
    """
    held = jnp.asarray(weight)
    if case.base in CODES:
        packed, state = _encoded(case, held, offset=offset)
        held = quant.decode(packed, state, dtype=jnp.dtype("float32"))
    if case.compute != "float64":
        held = held.astype(case.compute)
    return held.astype(jnp.float64)


STORAGES = {"bfloat16": ml_dtypes.bfloat16, **{name: np.dtype(name) for name in ("uint8", "float16", "float32")}}
"""What packed bytes may be seen as (Q3)."""
STACK_STORAGE = "bfloat16"
"""What they are seen as in a stack, `torch_impl`'s default."""


def stored_shape(case: Case, shape: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """The shape of a frozen weight as it is held, and its bytes an element: packed bytes are a column (S1, S6).

    Those of a row-parallel layer are a column for each of its rows, since tensor ranks cut these (S10).
    """
    if case.base not in CODES:
        return shape, {"bfloat16": 2, "float64": 8}.get(case.base, 4)
    width = np.dtype(STORAGES[STACK_STORAGE]).itemsize
    items = -(-((shape[0] * shape[1] + 1) // 2) // width)
    return ((shape[0], items // shape[0]) if shape[0] % case.tensor_ranks else (items, 1)), width


def stored_weight(case: Case, weight: np.ndarray, *, transposed: bool = False) -> np.ndarray:
    """The bits of a frozen weight as they are held: dense in its dtype, or packed, padded and seen as the storage.

    Packed bytes are of rows, also where the layer stores a dense weight by columns (`transposed`).
    """
    if case.base not in CODES:
        return (weight.T if transposed else weight).astype(STORAGES.get(case.base, case.base))
    packed, _ = _encoded(case, jnp.asarray(weight), offset=None)
    shape, width = stored_shape(case, weight.shape)
    held = np.zeros(shape[0] * shape[1] * width, np.uint8)
    held[: packed.size] = np.asarray(packed).ravel()
    return held.view(STORAGES[STACK_STORAGE]).reshape(shape)


def _encoded(case: Case, weight: Array, *, offset: float | None) -> tuple:
    nested = not case.flat
    extra = {"offset": offset} if nested else {}
    return quant.encode(weight, quant_type=case.base, blocksize=case.blocksize, profile=PROFILE, nested=nested, **extra)


def offset_and_bound(weight: np.ndarray) -> tuple[float, float]:
    """The mean of the blocks' absmax, and how far a float32 mean of them may lie off in any order of summation.

    The rigorous bound of a sum of n positive numbers: (n - 1) u relative, and one more rounding for the division
    (Higham, Accuracy and Stability, section 4.2).
    """
    blocks = np.abs(np.pad(weight.ravel(), (0, -weight.size % BLOCKSIZE))).reshape(-1, BLOCKSIZE)
    absmax = blocks.max(axis=1).astype(np.float64)
    return float(absmax.mean()), len(absmax) * 2.0**-24 * float(absmax.mean())
