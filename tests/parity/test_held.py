"""S1, S2: parity reads from torch's own records where a rank's shards lie; no implementation has to be believed."""

import pytest

from parity.cases import cases_of

pytestmark = pytest.mark.distributed

LATTICE = "stack/lattice/torch_impl/{}/uneven/float32-float32/plain"
ONE_HOT = "stack/one-hot/torch_impl/{}/uneven/float32-float32/plain"
PLACES = {
    "fsdp1": ONE_HOT.format("fsdp1-w3"),
    "fsdp1-alone": LATTICE.format("fsdp1-w1"),
    "fsdp1-orig": ONE_HOT.format("fsdp1-orig-w3"),
    "fsdp1-orig-alone": LATTICE.format("fsdp1-orig-w1"),
    "fsdp2": ONE_HOT.format("fsdp2-w3"),
    "hsdp": ONE_HOT.format("hsdp-w4"),
    "hybrid": "stack/lattice/torch_impl/fsdp1-hybrid-w6/uneven/nf4-float32/plain",
    "ddp": ONE_HOT.format("ddp-w2"),
    "empty": "stack/one-hot/torch_impl/fsdp1-orig-w3/single-row/float32-float32/plain",
    "packed": "stack/one-hot/torch_impl/fsdp2-w3/padded/nf4-float32/plain",
    "resumed": "stack/one-hot/torch_impl/fsdp1-w3/uneven/float32-float32/resume-fsdp2",
    "recomputed": "stack/one-hot/torch_impl/fsdp1-w2/uneven/nf4-float32/recompute",
}
CASES = {case.id: case for case in cases_of("quick")}


@pytest.mark.parametrize("place", PLACES)
def test_s1_s2_what_parity_reads_is_what_torch_impl_says(pipeline, place):
    """Of some strategy parity reads other places, values or names than `torch_impl.local_shards` gives."""
    (result,) = pipeline.run([(CASES[PLACES[place]], "readers:ReadByParity")])

    assert result.status == "passed", (result.reason, [check for check in result.checks if not check.passed][:2])
    assert any(check.kind == "layout" for check in result.checks) or place in {"fsdp1-alone", "fsdp1-orig-alone"}


@pytest.mark.parametrize(("implementation", "status"), [("ByColumns", "passed"), ("Misread", "failed")])
def test_a_third_party_may_cut_along_any_dimension(pipeline, implementation, status):
    """A layout that this project does not have is misplaced, or a wrong place of it passes."""
    (result,) = pipeline.run([(CASES[LATTICE.format("fsdp2-w2")], f"readers:{implementation}")])

    assert result.status == status, result.reason


def test_what_fsdp_leaves_alone_is_judged(pipeline):
    """A parameter outside of FSDP1's units, whose gradient nobody reduces, is taken for missing, or not looked at."""
    (result,) = pipeline.run([(CASES[LATTICE.format("fsdp1-w2")], "readers:Ignoring")])

    failed = [check for check in result.checks if not check.passed]
    assert {check.tensor.rpartition(".")[2] for check in failed if check.step == 1} >= {"magnitude"}
    assert not [check.fault for check in failed if "on no rank" in check.fault]
