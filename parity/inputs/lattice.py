"""Lattice inputs: numbers on which every route, order and framework gives the same bits.

Rows of V have 4^k entries of equal size and the rest zero, so that the norm is exactly a power of two; x, G, A
and B are small integers, the magnitudes dyadic multiples of the norm. `certify` then shows, quantity by
quantity, that the sum of absolute terms over the lattice's unit fits the significand: float32 (or, where a
product is rounded to bfloat16, eight bits) is exact in any order. The case is refused where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity.case import StackCase
from parity.errors import LatticeNotExact
from parity.inputs.certificate import (
    NARROW_BITS,
    certify,
    require_exact_squares,
    require_gradients,
    require_long_sums,
)
from parity.inputs.gaussian import drawn_masks

_PLAIN_ROWS = slice(1, None, 6)
"""Rows of B that are zero where sums are short, so that a loud token can reach dm alone."""
_WIDE = 2.0
"""A scaling beyond which an update has one tap a row: s^2 a tap must leave room in the square."""
_LOUD_TAPS = 8
"""Entries of a loud token that are not zero."""
_ATTEMPTS = 512
"""Draws before a case is called impossible; one in some tens succeeds where any does."""


@dataclass(frozen=True)
class Density:
    """The share of non-zero entries: bfloat16 has eight bits, so its sums must be short."""

    x: float
    G: float
    A: float


_DENSE = Density(x=0.35, G=0.15, A=0.35)
_SPARSE = Density(x=0.15, G=0.08, A=0.1)


def lattice_stack(case: StackCase, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a stack and its certificate.

    Raises:
        LatticeNotExact: no draw was exact in the case's dtypes.
    """
    reason: LatticeNotExact | None = None
    for _ in range(_ATTEMPTS):
        arrays = _draw(case, generator)
        try:
            require_gradients(case, arrays)
            if _has_loud_token(case):
                require_long_sums(case, arrays)
            certify(case, arrays)
        except LatticeNotExact as error:
            reason = error
            continue
        return arrays
    raise reason or LatticeNotExact(f"{case.id}: nothing was drawn")


def integer_stack(case: StackCase, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Small integers without any care for the norm: its square is exact in any order, its root is rounded once (D4).

    Raises:
        LatticeNotExact: a square, in its factored form, does not fit float32's significand.
    """
    arrays: dict[str, np.ndarray] = {}
    for position, (fan_in, fan_out) in enumerate(case.layers):
        most = 1 if case.base in {"nf4", "fp4"} else 3  # codes of an NF4 block with absmax 1
        weight = generator.integers(-most, most + 1, size=(fan_out, fan_in))
        weight.reshape(-1)[-1] = 1  # the last block may be short, and must not be all zeros
        lora_A = generator.integers(-1, 2, size=(case.rank, fan_in))
        lora_B = generator.integers(-1, 2, size=(fan_out, case.rank)) * (not case.zero_b)
        layer = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "magnitude": np.ones(fan_out)}
        require_exact_squares(case, layer, position)
        if case.base not in {"nf4", "fp4"}:
            _make_rows_hard(case, layer)
        arrays |= {f"layers.{position}.{name}": value.astype(np.float32) for name, value in layer.items()}
    return arrays


def _make_rows_hard(case: StackCase, layer: dict[str, np.ndarray]) -> None:
    """D4, D13: of every four rows one is tiny, one huge (both by a power of two), one nearly cancels s B A."""
    weight, lora_B = (layer[name].astype(np.float64) for name in ("weight", "lora_B"))
    for row, power in ((1, -84), (2, 80)):
        weight[row::4] *= 2.0**power
        lora_B[row::4] *= 2.0**power
    cancelling = case.scaling * (lora_B @ layer["lora_A"])[3::4]
    weight[3::4] = np.sign(weight[3::4]) * (np.arange(weight.shape[1]) % 7 == 0) - cancelling
    weight[3::4, 0] = 1.0 - cancelling[:, 0]
    layer["weight"], layer["lora_B"] = weight, lora_B


def _draw(case: StackCase, generator: np.random.Generator) -> dict[str, np.ndarray]:
    density = _SPARSE if case.compute in NARROW_BITS else _DENSE
    arrays: dict[str, np.ndarray] = {}
    for position, (fan_in, fan_out) in enumerate(case.layers):
        draw = _quantised_layer if case.base in {"nf4", "fp4"} else _dense_layer
        layer = draw(case, generator, fan_in=fan_in, fan_out=fan_out)
        arrays.update({f"layers.{position}.{name}": value for name, value in layer.items()})
    arrays |= drawn_masks(case, generator)
    arrays["x"] = _signs(generator, (case.tokens, case.layers[0][0]), density.x)
    arrays["G"] = _signs(generator, (case.tokens, case.layers[-1][1]), density.G)
    if _has_loud_token(case):
        _make_loud(case, generator, arrays)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def _has_loud_token(case: StackCase) -> bool:
    """In one layer alone whose output is not shifted: there powers of two by token add no bit to what a token gives."""
    rows = range(case.layers[0][1])[_PLAIN_ROWS]
    return case.compute in NARROW_BITS and len(case.layers) == 1 and not case.bias and bool(rows)


def _make_loud(case: StackCase, generator: np.random.Generator, arrays: dict[str, np.ndarray]) -> None:
    """Let the last token be a power of two louder, where A is zero, with a cotangent where B is.

    Of all sums over tokens only dm's then has terms of two sizes, and needs more bits than the compute dtype has: it
    is exact where it is summed in float32, and nowhere else.
    """
    silent = np.flatnonzero(~arrays["layers.0.lora_A"].any(axis=0))
    plain = np.flatnonzero(~arrays["layers.0.lora_B"].any(axis=1))
    for name, where, size in (("x", silent, 2.0 ** NARROW_BITS[case.compute]), ("G", plain, 1.0)):
        taps = generator.choice(where, size=min(_LOUD_TAPS, len(where)), replace=False)
        arrays[name][-1] = 0.0
        arrays[name][-1, taps] = size * generator.choice([-1.0, 1.0], size=len(taps))


def _dense_layer(
    case: StackCase, generator: np.random.Generator, *, fan_in: int, fan_out: int
) -> dict[str, np.ndarray]:
    """Choose V first; then W = V - s B A is a small integer, and overlaps s B A wherever V does."""
    density = _SPARSE if case.compute in NARROW_BITS else _DENSE
    count = _square_count(fan_in)
    V = np.stack([_row(generator, fan_in, count) for _ in range(fan_out)])
    lora_A = _signs(generator, (case.rank, fan_in), density.A)
    lora_B = _signs(generator, (fan_out, case.rank), 0.0 if case.zero_b else 0.5)
    if case.compute in NARROW_BITS:
        lora_B[_PLAIN_ROWS] = 0.0
    if case.zero_rows:
        V[::5] = 0.0
    weight = V - case.scaling * (lora_B @ lora_A)
    return _finish(case, generator, weight=weight, lora_A=lora_A, lora_B=lora_B)


def _quantised_layer(
    case: StackCase, generator: np.random.Generator, *, fan_in: int, fan_out: int
) -> dict[str, np.ndarray]:
    """W itself must be -1, 0 or 1 with every block's absmax 1, so V is steered through the overlap with A."""
    count = _square_count(fan_in)
    taps = 1 if case.scaling > _WIDE else max(1, min(2, count // 4))
    lora_A = np.stack([_row(generator, fan_in, taps) for _ in range(case.rank)])
    lora_B = np.zeros((fan_out, case.rank))
    weight = np.stack([_row(generator, fan_in, count) for _ in range(fan_out)])
    plain = range(fan_out)[_PLAIN_ROWS] if case.compute in NARROW_BITS else ()
    for row in range(fan_out):
        tap, sign = int(generator.integers(case.rank)), float(generator.choice([-1.0, 1.0]))
        update = case.scaling * sign * lora_A[tap]
        overlapping = None if case.zero_b or row in plain else _overlapping_row(generator, update, count)
        if overlapping is not None:
            lora_B[row, tap], weight[row] = sign, overlapping
    return _finish(case, generator, weight=weight, lora_A=lora_A, lora_B=lora_B)


def _overlapping_row(generator: np.random.Generator, update: np.ndarray, count: int) -> np.ndarray | None:
    """A row w of signs with |w + update|^2 = count that shares one tap with the update; None where none fits."""
    taps = np.flatnonzero(update)
    free = np.flatnonzero(update == 0)
    for direction in generator.permutation([-1.0, 1.0]):
        weight = np.zeros_like(update)
        shared = int(generator.choice(taps))
        weight[shared] = direction * np.sign(update[shared])
        others = count - int(((weight + update) ** 2).sum())
        if 0 <= others <= len(free):
            weight[generator.choice(free, size=others, replace=False)] = generator.choice([-1.0, 1.0], size=others)
            return weight
    return None


def _finish(case: StackCase, generator: np.random.Generator, **layer: np.ndarray) -> dict[str, np.ndarray]:
    """Add the dyadic magnitudes and the bias."""
    norm = np.linalg.norm(layer["weight"] + case.scaling * (layer["lora_B"] @ layer["lora_A"]), axis=1)
    ratio = generator.choice([0.5, 1.0, 2.0], size=len(norm)) if case.compute not in NARROW_BITS else np.ones(len(norm))
    layer["magnitude"] = np.where(norm > 0, norm * ratio, 1.0)
    if case.bias:
        bias = generator.integers(-2, 3, size=len(norm)).astype(np.float64)
        layer["bias"] = np.where((norm == 0) & (bias == 0), 1.0, bias)  # D7: a zero row's output is its bias, not 0
    return layer


def _square_count(fan_in: int) -> int:
    """The largest 4^k that leaves a third of the row free: the row's norm is then 2^k exactly."""
    count = 1
    while 4 * count <= min(2 * fan_in // 3, 16):
        count *= 4
    return count


def _row(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    row = np.zeros(size)
    row[generator.choice(size, size=count, replace=False)] = generator.choice([-1.0, 1.0], size=count)
    return row


def _signs(generator: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    signs = generator.choice([-1.0, 1.0], size=shape)
    return np.where(generator.random(shape) < density, signs, 0.0)
