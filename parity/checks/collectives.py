"""How often a step gathers and reduces: what the units of S7, the reduction of S9 and a deferred one (T5) come to.

Counted from the case alone. A layer of a stack is a block of its own: one unit, or two where its dense weight is cast
on the wire. Cut by layers it has two units, its base weight and its adapter, and a third where it has a bias. The stack
itself has no parameter and hence no unit.
"""

from __future__ import annotations

import itertools

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
    if case.unit_rule == "block":
        units = again = _units_of_a_block(case) * layers
    else:
        units = (3 if case.bias else 2) * layers
        again = 2 * layers + (layers if case.bias and not case.strategy.startswith("fsdp1") else 0)
    gathers = units + (0 if case.keep_gathered else again)
    reductions = layers * (1 if case.late else case.accumulate)
    sharded = np.array([gathers * case.accumulate, reductions, reductions if case.copies > 1 else 0])
    if case.tensor_ranks == 1:
        return sharded
    return _of_tensor_ranks(case) + (sharded if case.strategy != "tp" else 0)


def _of_tensor_ranks(case: TrainCase) -> np.ndarray:
    """S10: a row-parallel layer reduces its norm's terms and its output forwards, a column-parallel one its gradients.

    Where no neighbour has the other form, a row's input is sliced, and its gradient gathered; a column's output is
    gathered. A layer whose norm needs float64 rows reduces once more: the case has none.
    """
    rows = [case.is_row_parallel(f"layers.{position}") for position in range(len(case.layers))]
    between = sum(not row and after for row, after in itertools.pairwise(rows))
    reductions = sum(2 if row else 1 for row in rows)
    return case.accumulate * np.array([len(rows) - 2 * between, 0, reductions])


def _units_of_a_block(case: TrainCase) -> int:
    """A weight that is cast is apart. Under FSDP1 so is the adapter, and a bias of another dtype than the base's."""
    packed = case.base in {"nf4", "fp4"}
    is_cast = not packed and case.param_dtype not in {None, case.base}
    if not case.strategy.startswith("fsdp1"):
        return 2 if is_cast else 1
    return 2 + (case.bias and (packed or is_cast))


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
