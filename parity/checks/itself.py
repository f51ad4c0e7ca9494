"""What must not have changed, and what was declared: checks that need neither the oracle nor a twin.

Frozen weights keep every bit through training and resumption; a generator is what it was when the run was saved (T6);
the optimizer has the rates, the groups and the number of steps that the case declares (T3, T6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from parity.case import SteppedCase
from parity.checks.clauses import clauses_of
from parity.checks.expectation import assembled, is_frozen
from parity.checks.shard_check import Check, Expected, check_shard, failure
from parity.oracle.prediction import Key
from parity.shard import Shard

BEFORE, AFTER = "before", "after"
"""The names of a generator's state when a run is saved, and when it has been read back."""


def unchanged(case: SteppedCase, shards: list[Shard]) -> list[Check]:
    """Frozen weights after training against those before, by bits; digests where they are too large to send."""
    return [*_frozen(case, shards), *_digests(case, shards), *_generators(case, shards)]


def _frozen(case: SteppedCase, shards: list[Shard]) -> Iterator[Check]:
    parameters = [shard for shard in shards if shard.kind == "parameter" and is_frozen(shard)]
    wholes = assembled(shard for shard in parameters if shard.step == 0)
    for shard in parameters:
        before = wholes.get((0, "parameter", shard.name))
        if shard.step and before is not None:
            yield check_shard(shard, _itself(case, shard.key, before))
        elif shard.step:
            yield failure(shard.key, shard.rank, "it was not there before the first step", against="itself")


def _digests(case: SteppedCase, shards: list[Shard]) -> Iterator[Check]:
    digests = [shard for shard in shards if shard.kind == "digest"]
    first = {(shard.rank, shard.name): shard.array for shard in digests if shard.step == 0}
    for shard in digests:
        if shard.step:
            before = first.get((shard.rank, shard.name))
            yield _compared(case, shard, before, "it was not there before the first step")


def _generators(case: SteppedCase, shards: list[Shard]) -> Iterator[Check]:
    """T6: after resumption each rank draws what it would have drawn."""
    states = {(s.rank, s.name): s for s in shards if s.kind == "generator"}
    for (rank, name), shard in states.items():
        if name == AFTER:
            before = states.get((rank, BEFORE))
            yield _compared(case, shard, before and before.array, "no generator was saved")


def _compared(case: SteppedCase, shard: Shard, before: np.ndarray | None, absent: str) -> Check:
    if before is None:
        return failure(shard.key, shard.rank, absent, against="itself", clauses=clauses_of(case, shard.key, "itself"))
    return check_shard(shard, _itself(case, shard.key, before))


def _itself(case: SteppedCase, key: Key, value: np.ndarray) -> Expected:
    return Expected(value=value, mode="bits", against="itself", clauses=clauses_of(case, key, "itself"))


def as_declared(case: SteppedCase, shards: list[Shard]) -> list[Check]:
    """The optimizer's settings, its count of steps and the forwards of every step, against the case."""
    checks = []
    for shard in shards:
        if shard.kind != "setting":
            continue
        if shard.name not in _SETTINGS:
            checks.append(failure(shard.key, shard.rank, "the case declares no such setting", against="declared"))
            continue
        value = np.array(_SETTINGS[shard.name](case, shard.step), dtype=np.float64).reshape(-1)
        clauses = clauses_of(case, shard.key, "declared")
        expected = Expected(value=value, mode="bits", against="declared", clauses=clauses)
        checks.append(check_shard(shard, expected))
    return checks


_SETTINGS: dict[str, Callable[[SteppedCase, int], float | tuple[float, ...]]] = {
    "lr": lambda case, _: case.learning_rate,
    "momentum": lambda case, _: case.momentum,
    "weight_decay": lambda case, _: case.weight_decay if case.optimizer == "adamw" else 0.0,
    "betas": lambda _, __: (0.9, 0.999),
    "eps": lambda _, __: 1e-8,
    "step": lambda _, step: float(step),
    "forwards": lambda case, _: case.accumulate * (2.0 if case.recompute else 1.0),
}
"""T3, T5, T6: by name, what a setting must be after a step; and how often each layer's forward must have run."""
