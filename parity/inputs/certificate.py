"""The proof that a lattice case is exact: for each quantity that any route may form, absolute terms over the unit.

Axis legend: T tokens, O out, I in, R rank. A quantity on the lattice `unit * integers` is exact in any order of
summation when the sum of its absolute terms is at most `2^p` units, p being the significand's bits (24 for
float32; 8 where a product is rounded to bfloat16, 11 where to float16, whose range no such sum leaves).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity.case import LEARNING_RATE, StackCase, dropout_of
from parity.cases.worlds import LARGEST_ODD_PART, odd_part
from parity.errors import LatticeNotExact

_FLOAT32_BITS = 24
NARROW_BITS = {"bfloat16": 8, "float16": 11}
"""Compute dtypes whose significand is so short that sums must be, or be kept in float32."""
EXACT_DROPOUTS = (0.0, 0.5, 0.75)
"""The rates at which what is kept is multiplied by a power of two (D9)."""


@dataclass(frozen=True)
class Certificate:
    """For each quantity: how many units its absolute terms sum to, and how many are allowed."""

    units: dict[str, float]
    allowed: dict[str, float]

    def require(self, case: StackCase) -> None:
        """Raise where a quantity could round."""
        for name, units in self.units.items():
            if units > self.allowed[name]:
                raise LatticeNotExact(
                    f"{case.id}: {name} spans {units:.0f} units, {self.allowed[name]:.0f} are exact",
                    hint="fewer tokens, a smaller layer or a sparser draw",
                )


def certify(case: StackCase, arrays: dict[str, np.ndarray]) -> Certificate:
    """Push absolute values through forward, backward and first update, in float64.

    Raises:
        LatticeNotExact: a quantity could round, or a norm is no power of two.
    """
    largest = LARGEST_ODD_PART[case.compute]
    if odd_part(case.input_world) > largest:
        raise LatticeNotExact(
            f"{case.id}: {case.input_world} ranks multiply the cotangent by {odd_part(case.input_world)} and a power of"
            f" two, and lattices in {case.compute} are certified up to {largest}",
            hint="choose another world size, or a one-hot case",
        )
    ledger = _Ledger(case)
    x = np.abs(arrays["x"].astype(np.float64))
    x_unit, inputs = token_units(x), []
    for position in range(case.visited):
        layer = _absolute_layer(case, arrays, position)
        inputs.append((layer, x, x_unit))
        x, x_unit = ledger.forward(f"layers.{position}", layer, x, x_unit)
    G, G_unit = np.abs(arrays["G"].astype(np.float64)) * largest, 1.0
    for position in reversed(range(case.visited)):
        layer, x, x_unit = inputs[position]
        G, G_unit = ledger.backward(f"layers.{position}", layer, (x, x_unit), (G, G_unit))
    certificate = Certificate(ledger.units, ledger.allowed)
    certificate.require(case)
    return certificate


def require_gradients(case: StackCase, arrays: dict[str, np.ndarray]) -> None:
    """Refuse a draw too sparse to give a gradient at all: where all of it is zero, anything passes."""
    x, G = arrays["x"], arrays["G"]
    met = x.any() and G.any()
    if len(case.layers) == 1:
        met = met and bool((G * (x @ arrays["layers.0.weight"].T)).any())
    if not met:
        raise LatticeNotExact(f"{case.id}: x and G never meet", hint="more tokens, or a denser draw")


def token_units(x: np.ndarray) -> np.ndarray:
    """(T, 1): what each token's numbers are multiples of, a power of two; a token of zeros counts in ones."""
    least = np.min(np.abs(x), axis=1, keepdims=True, where=x != 0, initial=np.inf)
    return np.where(np.isfinite(least), least, 1.0)


def require_long_sums(case: StackCase, arrays: dict[str, np.ndarray]) -> None:
    """Refuse a draw whose magnitude gradient the compute dtype holds: summed there it would pass."""
    layer = {name: arrays[f"layers.0.{name}"].astype(np.float64) for name in ("weight", "lora_B")}
    plain = ~layer["lora_B"].any(axis=1)
    used = arrays["x"] * arrays.get("layers.0.keep", 1.0) / (1.0 - dropout_of(case))
    sums = np.abs((arrays["G"] * (used @ layer["weight"].T)).sum(axis=0))[plain].astype(np.int64)
    odd = sums // np.maximum(sums & -sums, 1)
    if not (odd >= 2 ** NARROW_BITS[case.compute]).any():
        raise LatticeNotExact(f"{case.id}: {case.compute} holds every dm", hint="more tokens, or a denser draw")


class _Ledger:
    """Collects the quantities of one case."""

    def __init__(self, case: StackCase) -> None:
        self.case = case
        self.scaling = case.scaling
        self.units: dict[str, float] = {}
        self.allowed: dict[str, float] = {}

    def note(self, name: str, terms: np.ndarray, unit: float | np.ndarray, *, rounded: bool = False) -> None:
        """Record a quantity; `unit` by token or for all, `rounded` where a product stores it in the compute dtype."""
        bits = NARROW_BITS.get(self.case.compute, _FLOAT32_BITS) if rounded else _FLOAT32_BITS
        self.units[name] = float(np.max(terms / unit, initial=0.0))
        self.allowed[name] = 2.0**bits

    def forward(self, name: str, layer: dict, x: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The norm in its direct and factored forms, then the output. The ratio c is 1/2, 1 or 2."""
        update = self.scaling * (layer["lora_B"] @ layer["lora_A"])
        cross = self.scaling * (layer["weight"] @ layer["lora_A"].T * layer["lora_B"]).sum(1)
        gram = layer["lora_A"] @ layer["lora_A"].T
        factored = (layer["weight"] ** 2).sum(1) + 2 * cross
        factored += self.scaling**2 * (layer["lora_B"] @ gram * layer["lora_B"]).sum(1)
        self.note(f"{name} n^2", ((layer["weight"] + update) ** 2).sum(1), 1.0)
        self.note(f"{name} n^2 factored", factored, 1.0)
        used = _dropped(x, layer, self.case)
        hidden = used @ layer["lora_A"].T
        self.note(f"{name} x A'", hidden, unit, rounded=True)
        y0 = used @ layer["weight"].T + self.scaling * (hidden @ layer["lora_B"].T)
        self.note(f"{name} y0", y0, unit, rounded=True)
        y = y0 * layer["ratio"] + layer["bias"]
        if "keep" in layer:  # (c - 1) (u W') instead of c (u W'), and what is never dropped
            y += (x + used) @ layer["weight"].T
        self.note(f"{name} y", y, unit / 2, rounded=True)
        return y, unit / 2

    def backward(
        self, name: str, layer: dict, at: tuple[np.ndarray, np.ndarray], cotangent: tuple[np.ndarray, float]
    ) -> tuple[np.ndarray, float]:
        """The closed form's sums, then the first update."""
        (x, x_units), (G, G_unit) = at, cotangent
        x_unit = float(x_units.min())
        used = _dropped(x, layer, self.case)
        hidden = used @ layer["lora_A"].T
        y0 = used @ layer["weight"].T + self.scaling * (hidden @ layer["lora_B"].T)
        H, H_unit = G * layer["ratio"], G_unit / 2
        narrow = self.scaling * (H @ layer["lora_B"])
        V = layer["weight"] + self.scaling * (layer["lora_B"] @ layer["lora_A"])
        self.note(f"{name} H B", narrow, H_unit, rounded=True)
        self._gradient(f"{name} dm", (G * y0).sum(0), layer["magnitude"], x_unit * G_unit, divided=layer["norm"])
        self._gradient(f"{name} dB", self.scaling * (H.T @ hidden), layer["lora_B"], H_unit * x_unit, rounded=True)
        self._gradient(f"{name} dA", narrow.T @ used, layer["lora_A"], H_unit * x_unit, rounded=True)
        dx = _dropped(H @ V, layer, self.case)
        if "keep" in layer:  # mask * ((H - G) W + s (H B) A) + G W
            dx += _dropped(G @ layer["weight"], layer, self.case) + G @ layer["weight"]
        self.note(f"{name} dx", dx, H_unit, rounded=True)
        return dx, H_unit

    def _gradient(
        self,
        name: str,
        terms: np.ndarray,
        parameter: np.ndarray,
        unit: float,
        *,
        divided: np.ndarray | None = None,
        rounded: bool = False,
    ) -> None:
        """A gradient and the parameter after one step; `divided` by powers of two changes only the exponent."""
        self.note(name, terms, unit, rounded=rounded)
        divisor = 1.0 if divided is None else np.maximum(divided, 1.0)
        step = LEARNING_RATE * terms / divisor
        step_unit = LEARNING_RATE * unit / np.max(divisor)
        self.note(f"{name} update", parameter + step, min(step_unit, 0.5))


def _dropped(values: np.ndarray, layer: dict[str, np.ndarray], case: StackCase) -> np.ndarray:
    """D9: mask * values, 1 / (1 - p) times what is kept: exact where that is a power of two."""
    return layer["keep"] * values / (1.0 - dropout_of(case)) if "keep" in layer else values


def _absolute_layer(case: StackCase, arrays: dict[str, np.ndarray], position: int) -> dict[str, np.ndarray]:
    """One layer's absolute values, with its norm n (a power of two, or 0) and its ratio c = m / n."""
    prefix = f"layers.{position}."
    layer = {k.removeprefix(prefix): v.astype(np.float64) for k, v in arrays.items() if k.startswith(prefix)}
    V = layer["weight"] + case.scaling * (layer["lora_B"] @ layer["lora_A"])
    norm = np.sqrt((V**2).sum(1))
    if np.any(np.frexp(norm[norm > 0])[0] != 0.5):  # noqa: PLR2004 - a power of two has mantissa 1/2
        raise LatticeNotExact(f"{case.id}: layer {position} has a norm that is no power of two")
    if dropout_of(case) not in EXACT_DROPOUTS:
        raise LatticeNotExact(f"{case.id}: 1 / (1 - {dropout_of(case):g}) is no power of two")
    if case.base in {"nf4", "fp4"}:
        _require_equal_blocks(case, layer["weight"], position)
    layer["norm"] = norm
    layer["ratio"] = np.where(norm > 0, layer["magnitude"] / np.where(norm > 0, norm, 1.0), 0.0)
    layer.setdefault("bias", np.zeros(len(norm)))
    return {name: np.abs(value) for name, value in layer.items()}


def _require_equal_blocks(case: StackCase, weight: np.ndarray, position: int) -> None:
    """Every block's absmax is 1: then nested scales are all the mean, and decode to it exactly (Q6)."""
    blocks = np.pad(np.abs(weight).ravel(), (0, -weight.size % case.blocksize)).reshape(-1, case.blocksize)
    if np.any(blocks.max(axis=1) != 1):
        raise LatticeNotExact(f"{case.id}: layer {position} has a block whose absmax is not 1")


def require_exact_squares(case: StackCase, layer: dict[str, np.ndarray], position: int) -> None:
    """n^2 is an integer whose absolute terms, in the factored form (D13), add up to less than 2^24."""
    weight, lora_A, lora_B = (np.abs(layer[name]).astype(np.float64) for name in ("weight", "lora_A", "lora_B"))
    scaling = case.scaling
    reach = (weight**2).sum(1) + 2 * scaling * ((weight @ lora_A.T) * lora_B).sum(1)
    reach += scaling**2 * ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1)
    if reach.max() >= 2.0**_FLOAT32_BITS:
        raise LatticeNotExact(f"{case.id}: layer {position} has squares beyond float32's integers")
    if case.base in {"nf4", "fp4"}:
        _require_equal_blocks(case, weight, position)
