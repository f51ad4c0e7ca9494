"""How often a step gathers and reduces: what the units of S7, the reduction of S9 and a deferred one (T5) come to.

Counted from the case alone. A layer has two units, its base weight and its adapter, and a third where it has a bias;
the stack itself has no parameter and hence no unit.
"""

from __future__ import annotations

import numpy as np

from parity.case import TrainCase
from parity.checks.clauses import clauses_of
from parity.checks.shard_check import Check, Expected, check_shard
from parity.shard import Shard


def expected_collectives(case: TrainCase) -> np.ndarray:
    """All-gathers, reduce-scatters and all-reduces of one step on each rank, in this order.

    Every forward gathers every unit. Every backward gathers them again unless they were kept; FSDP1 leaves out the
    biases, which no gradient goes through, where FSDP2's prefetch follows the order of the forward. Only adapters have
    gradients to reduce: with every backward, or once a step where the reduction is deferred (T5); replicas then
    all-reduce what each row of the mesh has reduced (S9).
    """
    layers = len(case.layers)
    again = 2 * layers + (layers if case.bias and not case.strategy.startswith("fsdp1") else 0)
    gathers = (3 if case.bias else 2) * layers + (0 if case.keep_gathered else again)
    reductions = layers * (1 if case.late else case.accumulate)
    return np.array([gathers * case.accumulate, reductions, reductions if case.copies > 1 else 0])


def check_collectives(case: TrainCase, shards: list[Shard]) -> list[Check]:
    """One check a rank and step."""
    value = expected_collectives(case)
    return [
        check_shard(
            shard,
            Expected(value=value, mode="bits", against="layout", clauses=clauses_of(case, shard.key, "layout")),
        )
        for shard in shards
        if shard.kind == "collectives"
    ]
