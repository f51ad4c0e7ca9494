"""All ranks together hold every element of every tensor, and hold it where S1 and S2 say."""

from functools import partial

import numpy as np
import pytest

from parity.cases import cases_of
from parity.checks.coverage import check_layout, copies_of, frozen_gradients, missing_elements
from parity.checks.shard_check import Expected
from parity.shard import Shard, whole_index

NAME = "layers.0.lora_B"
WHOLE = np.arange(12.0).reshape(4, 3)
KEY = (1, "gradient", NAME)


def rows(start, stop, *, rank=0, kind="gradient", step=1):
    """Those rows of B."""
    index = (slice(start, stop), slice(0, 3))
    array = WHOLE[start:stop]
    return Shard(name=NAME, kind=kind, step=step, global_shape=(4, 3), index=index, array=array, rank=rank)


def missing(*shards, key=KEY, copies=None):
    """The modes of the checks on what is missing."""
    expectations = {key: Expected(value=WHOLE, mode="bitwise")}
    found = missing_elements(shards, expectations, copies and (lambda _: copies), gives=("base",))
    return [check.fault for check in found]


def test_all_rows_are_nothing_missing():
    """Two halves are the whole."""
    assert missing(rows(0, 2), rows(2, 4, rank=1)) == []


def test_a_missing_row_is_counted():
    """Elements that no rank holds are counted."""
    assert missing(rows(0, 2), rows(3, 4, rank=1)) == ["coverage: 3 of 12 elements on no rank"]


def test_overlap_hides_no_gap():
    """Rows given twice do not stand for those that are not given."""
    assert missing(rows(0, 2), rows(0, 2, rank=1)) == ["coverage: 6 of 12 elements on no rank"]


def test_a_row_held_twice_is_counted():
    """S1: two ranks that hold the same row, and not all rows, have not sharded the tensor."""
    assert missing(rows(0, 3), rows(2, 4, rank=1)) == ["coverage: 3 of 12 elements on 2 ranks, wanted 1"]


def test_whole_copies_are_refused_where_one_is_wanted():
    """S1: a tensor left whole on both ranks is not sharded."""
    assert missing(rows(0, 4), rows(0, 4, rank=1), copies=1) == ["coverage: 12 of 12 elements on 2 ranks, wanted 1"]


def test_whole_copies_are_allowed_where_nothing_is_declared():
    """Who declares no units may leave a tensor whole on every rank."""
    assert missing(rows(0, 4), rows(0, 4, rank=1)) == []


def test_replicas_hold_each_element_as_often():
    """S9: two rows of two ranks hold every element twice."""
    held = [rows(0, 2), rows(2, 4, rank=1), rows(0, 2, rank=2), rows(2, 4, rank=3)]

    assert missing(*held, copies=2) == []
    assert missing(*held[:3], rows(0, 2, rank=3), copies=2) == ["coverage: 12 of 12 elements on 1 or 3 ranks, wanted 2"]


def test_another_step_does_not_cover():
    """A gradient of step 2 is no gradient of step 1."""
    assert missing(rows(0, 4, step=2)) == ["coverage: 12 of 12 elements on no rank"]


def test_an_index_outside_covers_nothing():
    """A shard that does not fit covers no element."""
    misplaced = Shard(name=NAME, kind="gradient", step=1, global_shape=(4, 3), index=(slice(0, 99),), array=WHOLE)

    assert missing(misplaced) == ["coverage: 12 of 12 elements on no rank"]


@pytest.mark.parametrize(
    "key",
    [
        *((1, kind, NAME) for kind in ("gradient", "parameter", "packed", "absmax", "decoded")),
        (1, "optimizer:momentum_buffer", NAME),
        (0, "parameter", "layers.0.base.weight"),
    ],
    ids=lambda key: f"{key[0]} {key[1]}",
)
def test_what_must_be_given(key):
    """Whatever is expected is missed, an optimizer's state and frozen weights included."""
    assert missing(key=key) != []


def test_a_frozen_tensor_with_a_gradient_fails():
    """An optimizer would train it."""
    trained = Shard(
        name="norm.weight", kind="gradient", step=1, global_shape=(4, 3), index=whole_index((4, 3)), array=WHOLE
    )

    assert [check.passed for check in frozen_gradients([trained])] == [False]


def places(shards, wanted):
    """Whether each place is right."""
    case = next(case for case in cases_of("quick") if case.strategy == "hsdp")
    return [check.passed for check in check_layout(case, shards, wanted)]


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        pytest.param((slice(0, 2), slice(0, 3)), True, id="the same"),
        pytest.param((slice(0, 3), slice(0, 3)), False, id="a row more"),
        pytest.param((slice(0, 6),), False, id="flat, of a cut tensor"),
    ],
)
def test_a_layout_is_told_by_its_range(wanted, right):
    """S1: a rank that says it holds other rows than its own fails."""
    assert places([rows(0, 2, kind="parameter", step=0)], {(NAME, 0): wanted}) == [right]


def test_empty_parts_are_alike():
    """S1: nothing, said as rows 4 to 4, is nothing said as 0 to 0."""
    assert places([rows(4, 4, kind="parameter", step=0)], {(NAME, 0): (slice(0, 0), slice(0, 3))}) == [True]


def test_a_whole_tensor_is_the_same_said_flat():
    """S2: all rows are all of the flattening."""
    assert places([rows(0, 4, kind="parameter", step=0)], {(NAME, 0): (slice(0, 12),)}) == [True]


def test_a_parameter_that_the_reference_does_not_know_fails():
    """S7: what lies outside of the reference's units is in no rank's layout."""
    assert places([rows(0, 4, kind="parameter", step=0)], {}) == [False]


def test_a_rank_that_says_nothing_of_a_parameter_fails():
    """S1: silence is no layout."""
    assert places([], {(NAME, 0): (slice(0, 4), slice(0, 3))}) == [False]


@pytest.mark.parametrize("kind", ["output", "input_gradient", "loss", "norm", "ratio"])
def test_what_is_declared_is_owed(kind):
    """Whoever declares that it gives outputs, losses or norms owes them; nobody else does."""
    wanted = {(1, kind, "y"): Expected(value=WHOLE, mode="bitwise")}

    assert [check.fault for check in missing_elements([], wanted, gives=(kind,))] != []
    assert missing_elements([], wanted, gives=()) == []


def test_a_quant_state_is_on_every_rank():
    """S6: what all ranks need to decode their bytes is not cut, and one that lacks it is missed."""
    case = next(
        c for c in cases_of("quick") if c.id == "pretrained/one-hot/torch_impl/fsdp2-w2/2-blocks/nf4-bfloat16/plain"
    )
    key, array = (0, "offset", "layers.0"), np.array(1.5, dtype=np.float32)
    parts = {"name": "layers.0", "kind": "offset", "step": 0, "global_shape": (), "index": (), "array": array}
    on_both = [Shard(**parts, rank=rank) for rank in range(2)]
    wanted = {key: Expected(value=array, mode="bitwise")}

    assert missing_elements(on_both, wanted, partial(copies_of, case)) == []
    (lacking,) = missing_elements(on_both[:1], wanted, partial(copies_of, case))
    assert lacking.fault == "coverage: 1 of 1 elements on 1 ranks, wanted 2"
