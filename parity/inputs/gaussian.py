"""Gaussian inputs: ordinary numbers, on which every route rounds differently.

W rows have norm near 1, as in a trained network; A and B make `s B A` comparable with W, so that a wrong
norm or a missing term is far outside rounding; magnitudes lie some ten per cent off the norm, so that c is not 1.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from parity.case import StackCase, dropout_of
from parity.inputs.ties import tied_weight


def gaussian_stack(case: StackCase, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the arrays of a stack, each rounded to the dtype that holds it."""
    arrays: dict[str, np.ndarray] = {}
    for position, (fan_in, fan_out) in enumerate(case.layers):
        layer = _layer(case, generator, fan_in=fan_in, fan_out=fan_out)
        arrays.update({f"layers.{position}.{name}": value for name, value in layer.items()})
    arrays |= drawn_masks(case, generator)
    arrays["x"] = _held(generator.standard_normal((case.tokens, case.layers[0][0])), case.compute)
    arrays["G"] = _held(generator.standard_normal((case.tokens, case.layers[-1][1])), case.compute)
    return arrays


def drawn_masks(case: StackCase, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """D9: which of every layer's inputs are kept, a share of 1 - p; none without dropout."""
    dropout = dropout_of(case)
    if not dropout:
        return {}
    return {
        f"layers.{position}.keep": (generator.random((case.tokens, fan_in)) >= dropout).astype(np.float32)
        for position, (fan_in, _) in enumerate(case.layers)
    }


def _layer(case: StackCase, generator: np.random.Generator, *, fan_in: int, fan_out: int) -> dict[str, np.ndarray]:
    # A four-bit base is made from bfloat16 numbers, as in QLoRA: then the mean of the blocks' absmax (Q6), which
    # both sides take in an order of their own, is exact before its one rounding, and every decoded bit is foretold.
    held = "bfloat16" if case.base in {"nf4", "fp4"} else case.base
    weight = _held(generator.standard_normal((fan_out, fan_in)) / np.sqrt(fan_in), held)
    if case.inputs == "ties":
        weight = tied_weight(generator, (fan_out, fan_in))
    lora_A = _held(generator.standard_normal((case.rank, fan_in)) / np.sqrt(fan_in), "float32")
    lora_B = _held(0.5 * generator.standard_normal((fan_out, case.rank)), "float32")
    if case.zero_b:
        lora_B = np.zeros_like(lora_B)
    if case.zero_rows:
        # W and B zero: V is exactly zero whatever A holds (a weight of -sBA would have to be representable).
        weight[::5] = 0.0
        lora_B[::5] = 0.0
    if case.hard_rows:
        _make_rows_hard(case, weight, lora_A=lora_A, lora_B=lora_B)
    norm = np.linalg.norm(weight.astype(np.float64) + case.scaling * (lora_B.astype(np.float64) @ lora_A), axis=1)
    layer = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    layer["magnitude"] = _held((norm + (norm == 0)) * (1.0 + 0.1 * generator.standard_normal(fan_out)), "float32")
    if case.bias:
        layer["bias"] = _held(generator.standard_normal(fan_out), case.base)
    return layer


def _make_rows_hard(case: StackCase, weight: np.ndarray, *, lora_A: np.ndarray, lora_B: np.ndarray) -> None:
    """D4, D13: of every four rows one is tiny, one huge, one is `-s B A` but for a thousandth of what it was."""
    for row, power in ((1, -84), (2, 80)):
        weight[row::4] *= np.float32(2.0**power)
        lora_B[row::4] *= np.float32(2.0**power)
    update = case.scaling * (lora_B[3::4].astype(np.float64) @ lora_A)
    weight[3::4] = _held(1e-3 * weight[3::4] - update, case.base)


def _held(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the dtype that holds the array, and give it back as float32 (float64 stays)."""
    if dtype == "float64":
        return values.astype(np.float64)
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    return values.astype(narrow).astype(np.float32)
