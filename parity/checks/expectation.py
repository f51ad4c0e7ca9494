"""From a case, what the oracle predicts and what the unsharded twin gave, to the expectation of each tensor.

Link 2 (shards) compares with the same framework's unsharded result; links 1 and 3 compare with the oracle. Modes by
proof: lattice and one-hot are bitwise, root allows a unit in the last place, bound has an array of limits, sensitivity
a limit on the 2-norm, decode and frozen weights every bit.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from parity.case import Case
from parity.checks.shard_check import Expected
from parity.errors import CaseFailed
from parity.oracle.prediction import Key, Prediction, Predictions
from parity.shard import Shard

ROOT_ULPS = 1.0
"""A square root of an exact number: half a unit where it is correctly rounded, one where it is faithful."""

Expectations = dict[Key, Expected]


def from_oracle(case: Case, predictions: Predictions) -> Expectations:
    """Links 1 and 3, and the codec."""
    return {
        key: _against_oracle(case, key, prediction)
        for key, prediction in predictions.items()
        if case.link != "algebra" or key[1] == "gradient"  # link 1 is about derivatives; its routes take no step
    }


def from_twin(case: Case, twin: list[Shard], predictions: Predictions, *, units: str = "") -> Expectations:
    """Link 2: the unsharded result of the same implementation, frozen weights included.

    `units` is what the implementation declares: with S7's, `layer`, it owes the base weights too.

    Raises:
        CaseFailed: that result lacks a tensor; leaving it out everywhere is no way to pass.
    """
    missed = sorted((owed(case) | (_owed_bases(case) if units == "layer" else set())) - {shard.key for shard in twin})
    if missed:
        step, kind, name = missed[0]
        raise CaseFailed(f"unsharded, it gives no {kind} of {name} at step {step}; {len(missed)} tensors are missing")
    start = {shard.name: shard for shard in twin if shard.step == 0 and is_frozen(shard.name)}
    return {
        shard.key: _against_twin(case, start.get(shard.name, shard), predictions.get(shard.key))
        for shard in twin
        if not (shard.kind == "gradient" and is_frozen(shard.name))  # `compare` refuses it wherever it comes from
    }


def _against_oracle(case: Case, key: Key, prediction: Prediction) -> Expected:
    if case.proof in {"decode", "files"}:
        # FP4's code 8 is a second 0, whose sign bitsandbytes gives it or not by the length of the rows (Q4)
        signless = case.base == "fp4" and key[1] == "decoded"
        return Expected(value=prediction.value, mode="bitwise" if signless else "bits")
    if case.is_exact:
        return Expected(value=_exactly_float32(case, key, prediction.value), mode="bitwise")
    if case.proof == "root":
        return Expected(value=prediction.value, mode="ulp", limit=ROOT_ULPS)
    mode = "norm" if case.proof == "sensitivity" and key[1] == "gradient" else "bound"
    return Expected(
        value=prediction.value,
        mode=mode,
        limit=prediction.limit,
        mutants=prediction.mutants,
        no_claim=prediction.no_claim,
    )


def _exactly_float32(case: Case, key: Key, value: np.ndarray) -> np.ndarray:
    """A lattice case's expectation is exact in float32, or the certificate was wrong."""
    narrow = value.astype(np.float32)
    if not np.array_equal(narrow.astype(np.float64), value):
        raise CaseFailed(
            f"{case.id}: the oracle's {key[2]} ({key[1]}) is no float32 number, so the lattice is not exact"
        )
    return narrow


def _against_twin(case: Case, shard: Shard, prediction: Prediction | None) -> Expected:
    if is_frozen(shard.name):
        return Expected(value=shard.array, mode="bits")
    if case.proof != "bound" or shard.step == 0 or prediction is None:
        return Expected(value=shard.array, mode="bitwise")
    return Expected(value=shard.array, mode="bound", limit=prediction.pair_limit, mutants=prediction.mutants)


def is_frozen(name: str) -> bool:
    """Whether a tensor belongs to no adapter."""
    return not name.endswith(("lora_A", "lora_B", "magnitude"))


def required(expectations: Expectations) -> set[Key]:
    """What an implementation must give: all that is expected. Leaving a tensor out is no way to pass."""
    return set(expectations)


def _owed_bases(case: Case) -> set[Key]:
    """S6: the frozen weights, packed or dense, before the first step."""
    positions = range(len(case.layers) if case.model == "stack" and case.task == "train" else 0)
    return {(0, "parameter", f"layers.{position}.base.weight") for position in positions}


def owed(case: Case) -> set[Key]:
    """The same, from the case alone; nothing for a network, whose names the oracle gives to link 3."""
    if case.model != "stack":
        return set()
    names = [f"layers.{position}" for position in range(len(case.layers))]
    if case.task == "merge":
        return {(0, "merged", f"{name}.weight") for name in names}
    if case.proof == "start":
        return {(0, "parameter", f"{name}.magnitude") for name in names}
    tensors = [f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B", "magnitude")]
    kinds = ("gradient", "parameter", *case.state_kinds)
    return set(product(range(1, case.steps + 1), kinds, tensors))
