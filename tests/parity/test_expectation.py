"""What is expected, and how strictly, follows from the proof alone; nobody passes by giving less."""

import dataclasses

import numpy as np
import pytest

from parity.case import Case
from parity.checks.expectation import from_oracle, from_twin, owed, required
from parity.errors import CaseFailed
from parity.oracle.prediction import Prediction
from parity.shard import Shard, whole_index

CASE = Case(link="shards", model="stack", proof="bound", layers=((3, 2),), rank=1, shape_name="tiny", world=2)
FRAMEWORKS = dataclasses.replace(CASE, link="frameworks", world=1)


def shard(name, kind, step, size=2):
    """A shard of ones."""
    array = np.ones(size, np.float32)
    return Shard(name=name, kind=kind, step=step, global_shape=(size,), index=whole_index((size,)), array=array)


def twin(case=CASE):
    """Everything that must be given, and a frozen weight."""
    return [
        *(shard(name, kind, step) for step, kind, name in owed(case)),
        shard("layers.0.base.weight", "parameter", 0),
    ]


def predictions():
    """A limit for every tensor."""
    ones = np.ones(2)
    return {key: Prediction(value=ones, limit=1e-3 * ones, pair_limit=2e-3 * ones) for key in owed(CASE)}


@pytest.mark.parametrize("proof", ["lattice", "one-hot"])
def test_shards_are_bitwise_where_nothing_rounds(proof):
    """Link 2 on a lattice or with one rank hot is equality, whatever the oracle would allow."""
    expected = from_twin(dataclasses.replace(CASE, proof=proof), twin(), predictions())

    assert {e.mode for key, e in expected.items() if key[0]} == {"bitwise"}


def test_shards_are_bounded_by_the_limit_of_pairs():
    """Link 2 on Gaussian data compares two roundings, so its limit is that of a pair."""
    expected = from_twin(CASE, twin(), predictions())[1, "gradient", "layers.0.lora_A"]

    assert (expected.mode, expected.limit[0]) == ("bound", 2e-3)


def test_frozen_weights_are_compared_to_the_bit():
    """A base weight is the same bits on every rank, also under a bound."""
    assert from_twin(CASE, twin(), predictions())[0, "parameter", "layers.0.base.weight"].mode == "bits"


def test_without_a_prediction_shards_are_bitwise():
    """A missing limit means equality, never that all is allowed."""
    assert from_twin(CASE, twin(), {})[1, "gradient", "layers.0.lora_A"].mode == "bitwise"


@pytest.mark.parametrize("lost", sorted(owed(CASE)), ids=lambda key: f"{key[1]} {key[2]}")
def test_a_twin_that_lacks_a_tensor_is_refused(lost):
    """What is left out unsharded too is named, not forgotten."""
    given = [shard for shard in twin() if shard.key != lost]

    with pytest.raises(CaseFailed, match=f"no {lost[1]} of {lost[2]} at step 1"):
        from_twin(CASE, given, {})


def test_a_start_owes_its_magnitudes():
    """D6's cases owe the magnitudes before any step, and nothing else."""
    assert owed(dataclasses.replace(CASE, proof="start", steps=0)) == {(0, "parameter", "layers.0.magnitude")}


def test_the_oracle_bounds_its_own_limit():
    """Link 3 compares one rounding with none."""
    expected = from_oracle(FRAMEWORKS, predictions())[1, "gradient", "layers.0.lora_A"]

    assert (expected.mode, expected.limit[0]) == ("bound", 1e-3)


@pytest.mark.parametrize(
    ("proof", "mode"),
    [("lattice", "bitwise"), ("decode", "bits"), ("sensitivity", "norm"), ("start", "bound"), ("root", "ulp")],
)
def test_each_proof_has_its_mode(proof, mode):
    """Lattices are equal, bytes are bits, networks have a norm, starts a bound, roots a unit."""
    expected = from_oracle(dataclasses.replace(FRAMEWORKS, proof=proof), predictions())

    assert expected[1, "gradient", "layers.0.lora_A"].mode == mode


def test_a_lattice_that_is_not_exact_is_refused():
    """An expectation that is no float32 number means that the certificate was wrong: the case fails."""
    inexact = {(1, "gradient", "layers.0.lora_A"): Prediction(value=np.array([1 + 2.0**-30]))}

    with pytest.raises(CaseFailed, match="lattice is not exact"):
        from_oracle(dataclasses.replace(FRAMEWORKS, proof="lattice"), inexact)


def test_link_1_is_about_derivatives():
    """The routes of link 1 take no step, so only their gradients are expected."""
    expected = from_oracle(dataclasses.replace(FRAMEWORKS, link="algebra"), predictions())

    assert {kind for _, kind, _ in expected} == {"gradient"}


def test_no_claim_reaches_the_check():
    """What the oracle declines to claim stays declined."""
    unclaimed = {(1, "gradient", "layers.0.lora_A"): Prediction(value=np.ones(2), limit=1.0, no_claim="too sensitive")}

    (expected,) = from_oracle(dataclasses.replace(FRAMEWORKS, proof="sensitivity"), unclaimed).values()

    assert expected.no_claim == "too sensitive"


def test_every_adapter_tensor_is_required():
    """Gradients, parameters and momenta of A, B and the magnitude are required at every step."""
    assert required(from_twin(CASE, twin(), {})) >= owed(CASE)
