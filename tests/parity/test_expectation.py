"""What is expected, and how strictly, follows from the case alone; nobody passes by giving less."""

import dataclasses

import numpy as np
import pytest

from parity.case import DecodeCase, NetworkCase, StartCase, TrainCase
from parity.checks.expectation import TABLE, dtype_of, from_oracle, from_twin, owed, required
from parity.errors import CaseFailed
from parity.oracle.prediction import Prediction
from parity.shard import Shard, whole_index

CASE = TrainCase(link="shards", inputs="gaussian", layers=((3, 2),), rank=1, shape_name="tiny", world=2)
FRAMEWORKS = dataclasses.replace(CASE, link="frameworks", world=1)
NETWORK = NetworkCase(link="frameworks", blocks=1)


def shard(name, kind, step, size=2):
    """A shard of ones."""
    array = np.ones(size, np.float32)
    return Shard(name=name, kind=kind, step=step, global_shape=(size,), index=whole_index((size,)), array=array)


def twin(case=CASE):
    """Everything that must be given, and a frozen weight."""
    return [
        *(shard(name, kind, step) for step, kind, name in owed(case)),
        shard("layers.0.base.weight", "parameter", 0),
        shard("lr", "setting", 1, size=1),
    ]


def predictions():
    """A limit for every tensor."""
    ones = np.ones(2)
    return {key: Prediction(value=ones, limit=1e-3 * ones, pair_limit=2e-3 * ones) for key in owed(CASE)}


def test_shards_are_bitwise_with_one_rank_hot():
    """Link 2 with one rank hot is equality with the same run unsharded."""
    expected = from_twin(dataclasses.replace(CASE, inputs="one-hot"), twin())

    assert {e.mode for key, e in expected.items() if key[0]} == {"bitwise"}
    assert {e.against for e in expected.values()} == {"twin"}


@pytest.mark.parametrize(("inputs", "twin"), [("lattice", False), ("gaussian", False), ("one-hot", True)])
def test_only_one_rank_hot_is_compared_with_itself(inputs, twin):
    """Link 2 on lattices and on Gaussian numbers rests on the reference, and not on the subject's own unsharded run."""
    assert dataclasses.replace(CASE, inputs=inputs).has_twin == twin


def test_a_run_of_its_own_is_not_a_twins():
    """An optimizer's settings are compared with what the case declares: the twin has no say."""
    assert not {key for key in from_twin(CASE, twin()) if key[1] == "setting"}


def test_frozen_weights_are_compared_to_the_bit():
    """A base weight is the same bits on every rank, also under a bound."""
    assert from_twin(CASE, twin())[0, "parameter", "layers.0.base.weight"].mode == "bits"


def test_the_first_momentum_is_not_counted_twice():
    """After one step the momentum is the gradient once more: checked, and said to repeat it."""
    expected = from_twin(CASE, twin())[1, "optimizer:momentum_buffer", "layers.0.lora_A"]

    assert expected.repeats == "the first gradient"


@pytest.mark.parametrize(("kind", "dtype"), [("parameter", "float32"), ("gradient", "float32"), ("output", "bfloat16")])
def test_d11_each_kind_has_its_dtype(kind, dtype):
    """What trains and its gradient are float32 whatever is computed in; an output is what it is computed in."""
    narrow = dataclasses.replace(FRAMEWORKS, compute="bfloat16")
    name = "y" if kind == "output" else "layers.0.magnitude"

    assert dtype_of(narrow, (1, kind, name)) == dtype


@pytest.mark.parametrize(("kind", "factor"), [("input_gradient", 2), ("loss", 2), ("output", 1)])
def test_s3_what_a_rank_backpropagates_carries_the_world_size(kind, factor):
    """A rank's loss and its input gradient are the world size times their part of the sum; its output is not."""
    lattice = dataclasses.replace(CASE, inputs="lattice", tokens=2)
    key = (1, kind, "x")
    (expected,) = from_oracle(lattice, {key: Prediction(value=np.array([3.0, 4.0]))}).values()

    assert expected.value.tolist() == [3 * factor, 4 * factor]


@pytest.mark.parametrize("clauses", [("D1", "S3", "D5")])
def test_a_twin_says_nothing_of_the_layer(clauses):
    """What is compared with the same code unsharded bears on the clauses of sharding alone."""
    case = dataclasses.replace(CASE, inputs="one-hot", clauses=clauses)

    assert from_twin(case, twin())[1, "gradient", "layers.0.lora_A"].clauses == ("S3",)
    assert "D5" in from_oracle(case, predictions())[1, "gradient", "layers.0.lora_A"].clauses


@pytest.mark.parametrize("lost", sorted(owed(CASE)), ids=lambda key: f"{key[1]} {key[2]}")
def test_a_twin_that_lacks_a_tensor_is_refused(lost):
    """What is left out unsharded too is named, not forgotten."""
    given = [shard for shard in twin() if shard.key != lost]

    with pytest.raises(CaseFailed, match=f"no {lost[1]} of {lost[2]} at step 1"):
        from_twin(CASE, given)


def test_a_start_owes_its_magnitudes():
    """D6's cases owe the magnitudes before any step, and nothing else."""
    assert owed(StartCase(link="shards", layers=CASE.layers)) == {(0, "parameter", "layers.0.magnitude")}


def test_the_oracle_bounds_its_own_limit():
    """Link 3 compares one rounding with none."""
    expected = from_oracle(FRAMEWORKS, predictions())[1, "gradient", "layers.0.lora_A"]

    assert (expected.mode, expected.limit[0]) == ("bound", 1e-3)


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(dataclasses.replace(FRAMEWORKS, inputs="lattice"), "bitwise", id="lattice"),
        pytest.param(DecodeCase(link="frameworks"), "bits", id="decode"),
        pytest.param(NETWORK, "norm", id="network"),
        pytest.param(StartCase(link="frameworks"), "bound", id="start"),
        pytest.param(StartCase(link="frameworks", inputs="integers"), "ulp", id="root"),
        pytest.param(dataclasses.replace(FRAMEWORKS, inputs="lattice", clip=0.5), "bound", id="clipped lattice"),
        pytest.param(dataclasses.replace(FRAMEWORKS, inputs="lattice", optimizer="adamw"), "bound", id="adamw"),
    ],
)
def test_each_kind_has_its_mode(case, mode):
    """Lattices are equal, bytes are bits, networks have a norm, starts a bound, roots a unit; as TABLE has it."""
    assert TABLE[case.tolerance].mode == mode

    expected = from_oracle(case, predictions())

    assert expected[1, "gradient", "layers.0.lora_A"].mode == mode


def test_a_lattice_that_is_not_exact_is_refused():
    """An expectation that is no float32 number means that the certificate was wrong: the case fails."""
    inexact = {(1, "gradient", "layers.0.lora_A"): Prediction(value=np.array([1 + 2.0**-30]))}

    with pytest.raises(CaseFailed, match="lattice is not exact"):
        from_oracle(dataclasses.replace(FRAMEWORKS, inputs="lattice"), inexact)


def test_link_1_is_about_derivatives():
    """The routes of link 1 take no step, so only their gradients are expected."""
    expected = from_oracle(dataclasses.replace(FRAMEWORKS, link="algebra"), predictions())

    assert {kind for _, kind, _ in expected} == {"gradient"}


def test_no_claim_reaches_the_check():
    """What the oracle declines to claim stays declined."""
    unclaimed = {(1, "gradient", "layers.0.lora_A"): Prediction(value=np.ones(2), limit=1.0, no_claim="too sensitive")}

    (expected,) = from_oracle(NETWORK, unclaimed).values()

    assert expected.no_claim == "too sensitive"


def test_every_adapter_tensor_is_required():
    """Gradients, parameters and momenta of A, B and the magnitude are required at every step."""
    assert required(from_twin(CASE, twin()), ()) >= owed(CASE)
