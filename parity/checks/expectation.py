"""What is compared with what, in one table: from a case, the oracle and the twin to each tensor's expectation.

A *lattice* is a set of inputs on which every sum is exact in any order. In a *one-hot* case all ranks but one have a
zero loss, so that no sum over ranks has two terms. A *twin* is the same case run unsharded by the same implementation:
what agrees with it is sharded rightly, and may still be wrong; only the oracle, which shares no code with what it
judges, says that it is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np

from parity.case import Case, MergeCase, StackCase, StartCase, SteppedCase, Tolerance, TrainCase
from parity.checks.clauses import clauses_of
from parity.checks.shard_check import Against, Expected, Mode
from parity.errors import CaseFailed
from parity.inputs.deal import deal_tokens
from parity.oracle.prediction import Key, Prediction, Predictions
from parity.shard import Shard

ROOT_ULPS = 1.0
"""A square root of an exact number: half a unit where it is correctly rounded, one where it is faithful."""
COARSEST = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}
"""By compute dtype: the uniform relative error that a check must see, or it is vacuous."""
PER_TOKEN = ("output", "input_gradient", "loss")
"""Kinds that belong to the tokens of one rank, and are sharded as they are."""
OBSERVED = ("norm", "ratio")
"""Kinds that a layer computes from gathered parameters: every rank has them whole."""
OWN = ("setting", "generator", "digest", "collectives")
"""Kinds that are a run's own, and compared with what it declared or with itself (`checks/itself.py`)."""
FACTORS = ("lora_A", "lora_B", "magnitude")

Expectations = dict[Key, Expected]


@dataclass(frozen=True)
class Comparison:
    """A row of the table."""

    against: Against
    mode: Mode | Literal[""]
    """Empty where words are compared, and no tensor."""


TABLE: dict[Tolerance, Comparison] = {
    "bitwise": Comparison("oracle", "bitwise"),
    "twin": Comparison("twin", "bitwise"),
    "bound": Comparison("oracle", "bound"),
    "ulp": Comparison("oracle", "ulp"),
    "norm": Comparison("oracle", "norm"),
    "bits": Comparison("oracle", "bits"),
    "plain": Comparison("itself", "bits"),
    "named": Comparison("refusal", ""),
}
"""By the case's tolerance. Two things depart from it: frozen weights, sharded or not, are compared with the bits that
the oracle packs, and with themselves before the first step; and of a network only gradients have a norm's limit."""


def from_oracle(case: Case, predictions: Predictions) -> Expectations:
    """What the reference says."""
    expectations = {
        key: _against_oracle(case, key, prediction)
        for key, prediction in predictions.items()
        if (case.link != "algebra" or key[1] in {"gradient", "input_gradient"})  # link 1 is about derivatives alone
        and key[1] not in _unseen(case)
    }
    return _without_repeats(case, expectations)


def from_twin(case: Case, twin: list[Shard]) -> Expectations:
    """What the same implementation gave unsharded.

    Raises:
        CaseFailed: that result lacks a tensor; leaving it out everywhere is no way to pass.
    """
    missed = sorted(owed(case) - {shard.key for shard in twin})
    if missed:
        step, kind, name = missed[0]
        raise CaseFailed(f"unsharded, it gives no {kind} of {name} at step {step}; {len(missed)} tensors are missing")
    wholes = assembled(twin)
    expectations = {
        shard.key: Expected(
            value=wholes[shard.key],
            mode="bits" if is_frozen(shard) else "bitwise",
            against="twin",
            clauses=clauses_of(case, shard.key, "twin"),
            dtype=shard.array.dtype.name,
            coarsest=COARSEST[case.compute],
        )
        for shard in twin
        if shard.kind not in (*OWN, *_unseen(case))
        and not (shard.kind == "gradient" and is_frozen(shard))  # `frozen_gradients` refuses it wherever it comes from
    }
    return _without_repeats(case, expectations)


def _unseen(case: Case) -> tuple[str, ...]:
    """What a layer that computes its forward twice does not show."""
    return OBSERVED if isinstance(case, SteppedCase) and case.recompute else ()


def assembled(shards: Iterable[Shard]) -> dict[Key, np.ndarray]:
    """Each tensor put together from its parts, of ranks or of forwards; a part that does not fit is left out."""
    wholes: dict[Key, np.ndarray] = {}
    for shard in shards:
        whole = wholes.setdefault(shard.key, np.zeros(shard.global_shape, shard.array.dtype))
        try:
            part = shard.part_of(whole)
        except IndexError:
            continue
        if part.shape == shard.array.shape and part.dtype == shard.array.dtype:
            part[...] = shard.array
    return wholes


def from_itself(case: Case, shards: list[Shard]) -> Expectations:
    """D12: a fresh adapter gives the plain layer's output, which the implementation computes beside it, to the bit."""
    plain = {shard.step: shard for shard in shards if shard.kind == "plain" and shard.rank == 0}
    return {
        (step, "output", "y"): Expected(
            value=shard.array,
            mode="bits",
            against="itself",
            clauses=clauses_of(case, (step, "output", "y"), "itself"),
            dtype=shard.array.dtype.name,
        )
        for step, shard in plain.items()
    }


def _against_oracle(case: Case, key: Key, prediction: Prediction) -> Expected:
    row, kind = TABLE[case.tolerance], key[1]
    about = {
        "clauses": clauses_of(case, key, "oracle"),
        "dtype": dtype_of(case, key),
        "coarsest": COARSEST[case.compute],
    }
    value, limit = _seen_by_ranks(case, key, prediction)
    if (key[1] == "parameter" and is_frozen_name(key[2])) or row.mode == "bits":
        # FP4's code 8 is a second 0, whose sign bitsandbytes gives it or not by the length of the rows (Q4)
        signless = case.base == "fp4" and kind == "decoded"
        return Expected(value=value, mode="bitwise" if signless else "bits", **about)
    if case.is_exact:
        return Expected(value=_exactly_float32(case, key, value), mode="bitwise", **about)
    if row.mode == "ulp":
        return Expected(value=value, mode="ulp", limit=ROOT_ULPS, **about)
    mode = "norm" if row.mode == "norm" and kind in {"gradient", "loss"} else "bound"
    # D5 is about these two alone; elsewhere its mutant differs by what a step later follows from them
    nearest = prediction.mutants if kind == "gradient" and key[2].endswith(("lora_A", "lora_B")) else {}
    return Expected(value=value, mode=mode, limit=limit, mutants=nearest, no_claim=prediction.no_claim, **about)


def _seen_by_ranks(case: Case, key: Key, prediction: Prediction) -> tuple[np.ndarray, np.ndarray | float | None]:
    """What ranks see of a loss that is a mean over them (S3): each backpropagates the world size times its part.

    Losses come from the oracle by token; a rank has those of its tokens. Packed bytes of a row-parallel layer are a
    column for each of its rows (S10).
    """
    value, limit = prediction.value, prediction.limit
    if case.tensor_ranks > 1 and key[2].endswith(".base.weight") and value.shape[1:] == (1,):
        layer = key[2].removesuffix(".base.weight")
        return (value.reshape(_outputs(case, layer), -1) if case.is_row_parallel(layer) else value), limit
    if not isinstance(case, TrainCase) or key[1] not in {"input_gradient", "loss"} or case.link == "algebra":
        return value, limit
    if key[1] == "loss":
        dealt = deal_tokens(case.tokens, case.input_world)
        value = np.array([value[part].sum() for part in dealt])
    return value * case.input_world, None if limit is None else limit * case.input_world


def _outputs(case: Case, layer: str) -> int:
    """The output features of a stack's layer."""
    return case.layers[int(layer.rpartition(".")[2])][1] if isinstance(case, StackCase) else 1


def dtype_of(case: Case, key: Key) -> str:
    """D11: what trains, its gradient and its state are float32 (in float64, all is); activations as computed in."""
    _, kind, name = key
    wide = "float64" if case.compute == "float64" else "float32"
    trained = kind in {"parameter", "gradient"} or kind.startswith("optimizer:")
    if trained and name.endswith(FACTORS) and case.subject in {"torch_impl", "jax", "jax-mesh"}:
        return wide
    if kind in OBSERVED:
        return wide
    if kind in {"output", "input_gradient"} and case.subject == "torch_impl":
        return case.compute
    return ""


def _exactly_float32(case: Case, key: Key, value: np.ndarray) -> np.ndarray:
    """A lattice case's expectation is exact in float32, or the certificate was wrong."""
    narrow = value.astype(np.float32)
    if not np.array_equal(narrow.astype(np.float64), value):
        raise CaseFailed(
            f"{case.id}: the oracle's {key[2]} ({key[1]}) is no float32 number, so the lattice is not exact"
        )
    return narrow


def _without_repeats(case: Case, expectations: Expectations) -> Expectations:
    """The first step's momentum is the gradient once more: checked, and not counted a second time."""
    if not isinstance(case, SteppedCase) or case.optimizer != "sgd":
        return expectations
    key_of = {key: (key[0], "gradient", key[2]) for key in expectations if key[1] == "optimizer:momentum_buffer"}
    repeated = {
        key: replace(expectations[key], repeats="the first gradient")
        for key, gradient in key_of.items()
        if key[0] == 1 and gradient in expectations
    }
    return expectations | repeated


def is_frozen(shard: Shard) -> bool:
    """Whether a shard is a parameter, or the gradient of one, that belongs to no adapter."""
    return shard.kind in {"parameter", "gradient"} and is_frozen_name(shard.name)


def is_frozen_name(name: str) -> bool:
    """Whether a parameter's name is that of no adapter's tensor."""
    return not name.endswith(FACTORS)


def required(expectations: Expectations, gives: tuple[str, ...]) -> set[Key]:
    """What an implementation must give: all that is expected, of what it declares and of what everyone owes."""
    return {key for key in expectations if _is_owed(key, gives)}


def _is_owed(key: Key, gives: tuple[str, ...]) -> bool:
    """Frozen weights are owed as `base` where declared; outputs and norms where they can be observed."""
    _, kind, name = key
    if kind in {*PER_TOKEN, *OBSERVED}:
        return kind in gives
    if kind == "parameter" and is_frozen_name(name):
        return "base" in gives
    return True


def owed(case: Case) -> set[Key]:
    """What an unsharded twin must give, from the case alone; nothing for a network, whose names link 3 has."""
    names = [f"layers.{position}" for position in range(len(case.layers))] if isinstance(case, StackCase) else []
    match case:
        case MergeCase():
            return {(0, "merged", f"{name}.weight") for name in names}
        case StartCase():
            return {(0, "parameter", f"{name}.magnitude") for name in names}
        case TrainCase():
            factors = FACTORS if case.method == "dora" else FACTORS[:2]
            tensors = [f"{name}.{factor}" for name in names for factor in factors]
            kinds = ("gradient", "parameter", *case.state_kinds)
            return set(product(range(1, case.steps + 1), kinds, tensors))
    return set()
