"""Inputs of a pretrained network: real text, dealt unevenly, and an adapter for every linear layer.

Axis legend: A (rank, in), B (out, rank). Numbers depend on the layer's name and the case alone. B is not zero, or
every gradient of A would be; magnitudes start at D6 and are then scaled by a fixed pattern, so that c is not 1.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from parity.case import NetworkCase, OffsetCase
from parity.inputs.deal import deal_tokens
from parity.models.pretrained import token_ids

MAGNITUDE_PATTERN = np.array([1.0, 1.125, 0.875, 1.0625], dtype=np.float32)
"""Row i's magnitude starts at its norm times entry i mod 4; one rounding in float32."""


def adapter_factors(
    case: NetworkCase | OffsetCase, name: str, *, fan_in: int, fan_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one layer, float32, small beside a trained weight but not negligible."""
    generator = np.random.default_rng(zlib.crc32(f"{name} {case.rank} {case.seed}".encode()))
    lora_A = generator.standard_normal((case.rank, fan_in)) / np.sqrt(fan_in)
    lora_B = 0.05 * generator.standard_normal((fan_out, case.rank))
    return lora_A.astype(np.float32), lora_B.astype(np.float32)


def starting_magnitude(norm: np.ndarray) -> np.ndarray:
    """The norm (rounded to float32) times the pattern, rounded once more."""
    pattern = np.resize(MAGNITUDE_PATTERN, norm.shape)
    return norm.astype(np.float32) * pattern


def sequences(case: NetworkCase, model: Path) -> list[np.ndarray]:
    """One sequence of token ids for each rank: unequal parts of the same real text."""
    ids = np.asarray(token_ids(model, case.tokens), dtype=np.int64)
    return [ids[part] for part in deal_tokens(case.tokens, case.input_world)]


def predicted_tokens(case: NetworkCase, model: Path) -> int:
    """How many tokens all ranks predict together: the denominator of the token mean (T1)."""
    return sum(len(sequence) - 1 for sequence in sequences(case, model))
