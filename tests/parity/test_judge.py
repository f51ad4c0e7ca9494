"""Who is only compared with itself is judged as well, and who is judged already is not judged twice."""

import numpy as np
import pytest

from parity.case import UNSHARDED, StartCase, SteppedCase, TrainCase
from parity.cases import cases_of
from parity.checks.collectives import check_collectives, expected_collectives
from parity.checks.itself import as_declared, unchanged
from parity.commands.judge import with_judges
from parity.shard import Shard, whole_index

QUICK = cases_of("quick")
OURS = [case for case in QUICK if case.subject == "torch_impl"]
TWINS = [case for case in OURS if case.has_twin and isinstance(case, SteppedCase | StartCase)]
STEPPED = [case for case in QUICK if isinstance(case, TrainCase)]
RESUMED = next(case for case in STEPPED if case.resume == "fsdp2" and case.optimizer == "adamw")
COUNTED = [case for case in STEPPED if case.counted]


def added(cases):
    """What comes along."""
    chosen = [(case, "mine") for case in cases]
    return [case for case, _ in with_judges(chosen, "quick", 0)[: -len(chosen)]]


@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.id)
def test_a_twin_brings_a_judge(case):
    """A case that is compared with the same code unsharded brings one of its kind that the reference judges."""
    (judge,) = added([case])

    assert (judge.base, judge.compute) == (case.base, case.compute)
    assert (judge.has_twin, judge.strategy) == (False, UNSHARDED)


def test_one_judge_serves_all_of_a_kind():
    """Cases of one base and one compute dtype are judged once."""
    kinds = {(case.base, case.compute) for case in TWINS}

    assert len(added(TWINS)) == len(kinds)


def test_who_is_judged_already_is_not_judged_twice():
    """A whole tier brings nothing along."""
    assert added(OURS) == []


# what must not have changed


def tensor(name, kind, step, values, *, rank=0):
    """A whole tensor."""
    array = np.asarray(values)
    index = whole_index(array.shape)
    return Shard(name=name, kind=kind, step=step, global_shape=array.shape, index=index, array=array, rank=rank)


def verdicts(checks):
    """Whether each check passed."""
    return [check.passed for check in checks]


@pytest.mark.parametrize(("after", "passed"), [([1.0, 2.0], True), ([1.0, np.nextafter(2.0, 3.0)], False)])
def test_a_frozen_weight_keeps_every_bit(after, passed):
    """One unit in the last place is a moved weight."""
    name = "layers.0.base.weight"

    checks = unchanged(RESUMED, [tensor(name, "parameter", 0, [1.0, 2.0]), tensor(name, "parameter", 2, after)])

    assert verdicts(checks) == [passed]


def test_a_digest_is_that_of_its_own_rank():
    """A network's frozen weights are compared by their digests, rank by rank."""
    held = [tensor("w", "digest", step, np.uint8([rank]), rank=rank) for rank in (0, 1) for step in (0, 1)]
    other = tensor("w", "digest", 1, np.uint8([7]), rank=1)

    assert verdicts(unchanged(RESUMED, held)) == [True, True]
    assert verdicts(unchanged(RESUMED, [*held[:3], other])) == [True, False]


def test_t6_a_generator_goes_on_where_it_stopped():
    """A resumed rank draws what it would have drawn, and not what another one would."""
    states = [tensor("before", "generator", 1, np.uint8([rank]), rank=rank) for rank in (0, 1)]
    after = [tensor("after", "generator", 1, np.uint8([0]), rank=rank) for rank in (0, 1)]

    assert verdicts(unchanged(RESUMED, [*states, *after])) == [True, False]


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [
        ("lr", RESUMED.learning_rate, True),
        ("lr", 2 * RESUMED.learning_rate, False),
        ("eps", 1e-8, True),
        ("eps", 1e-6, False),
        ("step", 2.0, True),
        ("step", 1.0, False),
        ("nesterov", 1.0, False),
    ],
)
def test_t3_settings_are_the_declared_ones(name, value, passed):
    """The optimizer's rate, its addend and its count of steps are those of the case, after resumption too."""
    assert verdicts(as_declared(RESUMED, [tensor(name, "setting", 2, [value])])) == [passed]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.id)
def test_s7_one_gather_more_is_seen(case):
    """A unit that is cut in two, or reduced once more than it should, changes a count."""
    right = expected_collectives(case)

    assert verdicts(check_collectives(case, [tensor("step", "collectives", 1, right)])) == [True]
    for more in np.eye(len(right), dtype=right.dtype):
        assert verdicts(check_collectives(case, [tensor("step", "collectives", 1, right + more)])) == [False]


def test_an_exact_judge_comes_before_a_like_one():
    """A bounded judge of the same shape, whose bounds may show none of its clauses, is preferred to an exact one."""
    narrow = ("bfloat16", "bfloat16", "one-hot", True)
    chosen = next(
        case
        for case in cases_of("quick")
        if isinstance(case, TrainCase) and (case.base, case.compute, case.inputs, case.bias) == narrow
    )

    judges = [case for case, _ in with_judges([(chosen, "torch_impl")], "quick", 0) if case != chosen]

    assert [judge.inputs for judge in judges] == ["lattice"]
