"""What a rank does wrong fails its own case, by name, and no other: crashes, hangs, exceptions and bad shards."""

import dataclasses
import math
from unittest import mock

import pytest

from parity import pipeline as pipeline_module
from parity.cases import cases_of

pytestmark = pytest.mark.distributed

ONE_HOT = "stack/one-hot/torch_impl/fsdp2-w2/thin/float32-float32/plain"
(CASE,) = (case for case in cases_of("quick") if case.id == ONE_HOT)
HANG_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a fake's case, and of the honest one after it on the same pool."""

    bad: object
    good: object
    pids_before: tuple
    pids_after: tuple


def pids(pipeline):
    """The processes of the pool of two."""
    return tuple(process.pid for process in pipeline._pools._pools[2]._processes)


@pytest.fixture(scope="module")
def outcome(pipeline):
    """Run a fake between two honest cases; once a fake."""
    seen = {}

    def run(name):
        if name not in seen:
            (first,) = pipeline.run([(CASE, "fakes:Honest")])
            assert first.status == "passed", first.reason
            before = pids(pipeline)
            with mock.patch.object(pipeline_module, "limit_seconds", return_value=HANG_SECONDS):
                (bad,) = pipeline.run([(CASE, f"fakes:{name}")])
            (good,) = pipeline.run([(CASE, "fakes:Honest")])
            seen[name] = Outcome(bad, good, before, pids(pipeline))
        return seen[name]

    return run


CRASHES = {
    "Killed": ["rank 1 of 2", "SIGKILL"],
    "Exits": ["rank 1 raised SystemExit: 7 (fakes.py:"],
    "Hung": ["no answer within 2 s", "rank 1 at", "fakes.py", "misbehave"],
    "Raises": ["rank 1 raised ValueError: the drawn card was red (fakes.py:"],
    "OpenIndex": ["rank 1 raised", "layers.0.magnitude"],
    "SteppedIndex": ["rank 1 raised", "layers.0.magnitude"],
    "NoArray": ["rank 1 raised", "layers.0.magnitude"],
}
WRONG_SHARDS = {
    "OutsideIndex": ("layers.0.magnitude", 1, "place: 20:33 is outside 0:27"),
    "Misshapen": ("layers.0.magnitude", 1, "place: shape (12,)"),
    "OtherShape": ("layers.0.magnitude", 1, "of (28,), wanted"),
    "NotANumber": ("layers.0.magnitude", 1, "bitwise"),
    "Swapped": ("layers.0.lora_A", 0, "bitwise"),
    "Moved": ("layers.0.lora_A", 1, "wanted [1:2, 0:40]"),
    "OneRankMissing": ("layers.0.magnitude", -1, "coverage: 13 of 27 elements on no rank"),
    "Silent": ("layers.0.lora_A", -1, "coverage: 80 of 80 elements on no rank"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_broken_rank_is_named(outcome, name):
    """A rank that crashes, hangs or raises is the error of its case, in one line with the rank in it."""
    bad = outcome(name).bad

    assert bad.status == "error"
    assert [part for part in CRASHES[name] if part not in bad.reason] == []
    assert "\n" not in bad.reason


@pytest.mark.parametrize("name", CRASHES)
def test_after_a_broken_rank_the_whole_pool_is_new(outcome, name):
    """No rank of a failed job serves another one."""
    ran = outcome(name)

    assert set(ran.pids_before) & set(ran.pids_after) == set()


@pytest.mark.parametrize("name", [*CRASHES, *WRONG_SHARDS])
def test_the_next_case_passes(outcome, name):
    """What one case did wrong does not reach the next."""
    good = outcome(name).good

    assert (good.status, good.reason) == ("passed", "")


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_a_wrong_shard_is_a_failed_check(outcome, name):
    """A shard that is missing, misplaced, misshapen or wrong fails a check that names tensor and rank."""
    tensor, rank, said = WRONG_SHARDS[name]
    bad = outcome(name).bad

    failed = [check for check in bad.checks if not check.passed]
    assert bad.status == "failed"
    assert [c for c in failed if (c.tensor, c.rank) == (tensor, rank) and said in (c.fault or c.mode)] != []


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_a_wrong_shard_costs_no_pool(outcome, name):
    """Ranks that answered are kept."""
    ran = outcome(name)

    assert ran.pids_before == ran.pids_after


def test_nan_is_shown(outcome):
    """The evidence of a NaN is its place."""
    (failed,) = (check for check in outcome("NotANumber").bad.checks if not check.passed)

    assert failed.evidence.at == (2,)
    assert math.isnan(failed.evidence.got)


def test_nothing_at_all_is_an_error(outcome):
    """An implementation that gives no shard, unsharded either, does not pass."""
    assert outcome("Mute").bad.status == "error"


def test_nothing_expected_is_an_error(pipeline):
    """A case in which nothing came to be compared does not pass, whatever the ranks gave."""
    with mock.patch.object(pipeline_module, "from_twin", return_value={}):
        (bare,) = pipeline.run([(CASE, "fakes:Honest")])

    assert (bare.status, bare.checks) == ("error", ())
    assert "nothing that could be checked" in bare.reason


def test_what_is_never_given_is_missed(outcome):
    """Magnitudes that are left out unsharded too are missed: the twin alone does not say what there must be."""
    bad = outcome("WithoutMagnitudes").bad

    assert bad.status == "error"
    assert "no gradient of layers.0.magnitude at step 1" in bad.reason


def test_a_rank_that_died_between_cases_is_named(pipeline):
    """A death while nobody asks fails the next case, by name; the one after runs on a new pool."""
    (first,) = pipeline.run([(CASE, "fakes:DiesAfterwards")])
    for process in pipeline._pools._pools[2]._processes[1:]:
        process.join(10)

    second, third = pipeline.run([(CASE, "fakes:Honest")] * 2)

    assert [first.status, second.status, third.status] == ["passed", "error", "passed"]
    assert "rank 1 of 2" in second.reason
    assert "SIGKILL" in second.reason


def test_a_refusal_is_a_skip_with_its_reason(outcome):
    """A case that the implementation refuses is skipped, and says why."""
    bad = outcome("Refuses").bad

    assert (bad.status, bad.reason) == ("skipped", "it is Sunday")


def test_an_implementation_that_is_not_there_is_named(outcome):
    """A class that its module lacks is the case's error, with the name that was asked for."""
    assert "'fakes:Nobody'" in outcome("Nobody").bad.reason


def test_no_torch_rank_loads_jax(pipeline, tmp_path, monkeypatch):
    """A rank of torch_impl and of the fakes has torch among its modules, and neither jax nor the reference."""
    monkeypatch.chdir(tmp_path)
    (ran,) = pipeline.run([(dataclasses.replace(CASE, world=3), "fakes:Modules")])

    loaded = {name.partition(".")[0] for name in (tmp_path / "modules.txt").read_text().splitlines()}
    assert ran.status == "passed"
    assert {"torch", "torch_impl"} <= loaded
    assert loaded & {"jax", "jaxlib", "flax", "ref"} == set()
