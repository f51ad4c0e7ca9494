"""A case is a question of one kind: it has the fields of that kind, and no others."""

import dataclasses
import pickle

import pytest

from parity.case import (
    Case,
    CheckpointCase,
    ControlCase,
    DecodeCase,
    ExchangeCase,
    MergeCase,
    NetworkCase,
    NeutralCase,
    OffsetCase,
    RefuseCase,
    StartCase,
    TrainCase,
)
from parity.cases import cases_of
from parity.checks.expectation import TABLE

NEEDED = {RefuseCase: {"bad": "nan-weight"}, NetworkCase: {"blocks": 2}, OffsetCase: {"blocks": 2}}
FOREIGN = [
    *((kind, {"steps": 1}) for kind in (StartCase, NeutralCase, MergeCase, ExchangeCase, RefuseCase, DecodeCase)),
    (MergeCase, {"clip": 0.5}),
    (MergeCase, {"inputs": "one-hot", "resume": "fsdp2"}),
    (ExchangeCase, {"storage": "uint8"}),
    (CheckpointCase, {"direction": "read"}),
    (RefuseCase, {"inputs": "lattice"}),
    (NeutralCase, {"zero_b": False}),
    (NetworkCase, {"layers": ((3, 2),)}),
    (NetworkCase, {"dropout": 0.5}),
    (OffsetCase, {"optimizer": "adamw"}),
    (ControlCase, {"link": "shards"}),
    (TrainCase, {"bad": "nan-weight"}),
    (TrainCase, {"blocks": 2}),
]


@pytest.mark.parametrize(
    ("kind", "fields"), FOREIGN, ids=lambda value: getattr(value, "__name__", None) or ",".join(value)
)
def test_a_kind_takes_no_field_of_another(kind, fields):
    """What a question does not have cannot be said of it."""
    sound = {"link": "frameworks"} if kind is not ControlCase else {}

    with pytest.raises(TypeError, match="unexpected keyword argument"):
        kind(**sound, **NEEDED.get(kind, {}), **fields)


def test_a_case_is_of_some_kind():
    """There is no question of no kind."""
    with pytest.raises(TypeError, match="abstract"):
        Case(link="shards")  # pyright: ignore[reportAbstractUsage]


KINDS = list({type(case): case for case in cases_of("quick")}.values())


@pytest.mark.parametrize("case", KINDS, ids=lambda case: type(case).__name__)
def test_a_kind_is_compared_somehow(case):
    """Each has a task, a model, and a row in the table of what is compared with what."""
    assert case.task
    assert case.model == case.id.split("/")[0]
    assert case.tolerance in TABLE


@pytest.mark.parametrize("case", KINDS, ids=lambda case: type(case).__name__)
def test_a_case_crosses_to_a_rank_as_it_is(case):
    """Jobs are pickled: the case that arrives is of the same kind, and equal."""
    there = pickle.loads(pickle.dumps(case))  # noqa: S301 - its own

    assert (type(there), there) == (type(case), case)


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"inputs": "lattice"}, "bitwise"),
        ({"inputs": "lattice", "clip": 0.5}, "bound"),
        ({"inputs": "lattice", "optimizer": "adamw"}, "bound"),
        ({"inputs": "gaussian"}, "bound"),
        ({"inputs": "one-hot", "clip": 0.5}, "twin"),
    ],
    ids=str,
)
def test_a_tolerance_follows_from_the_case(fields, tolerance):
    """Nothing can be declared exact that is not: a root or a moment takes part in what is clipped or AdamW's."""
    assert TrainCase(link="shards", **fields).tolerance == tolerance


@pytest.mark.parametrize("case", [StartCase(link="shards"), MergeCase(link="shards")], ids=lambda case: case.task)
def test_what_is_sharded_is_compared_with_what_is_not(case):
    """Starts and merges have a twin under every strategy, and the oracle without one."""
    sharded = dataclasses.replace(case, strategy="fsdp2", world=2)

    assert (case.has_twin, sharded.has_twin, sharded.unsharded_twin().has_twin) == (False, True, False)


def test_offsets_are_asked_of_the_same_network():
    """Q4: what the oracle decodes with is of the case's own base, adapters and blocks."""
    case = NetworkCase(link="frameworks", base="nf4", rank=8, alpha=12.0, blocks=2, seed=3, strategy="fsdp2", world=2)
    asked = case.offsets()

    assert (asked.base, asked.rank, asked.alpha, asked.blocks, asked.seed) == ("nf4", 8, 12.0, 2, 3)
    assert (asked.strategy, asked.world) == ("none", 1)
