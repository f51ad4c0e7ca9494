"""A run holds only when it is complete and has shown something; its file is whole, valid, and never half-written."""

import dataclasses
import json
import math
from importlib.resources import files

import jsonschema
import numpy as np
import pytest

from parity.case import TrainCase
from parity.checks.shard_check import Check, Evidence
from parity.report.environment import describe
from parity.report.results import CaseResult, Results, worst_of, write_json

CASE = TrainCase(link="shards", inputs="gaussian", shape_name="tiny", clauses=("D1", "S3"))
CHECK = Check(
    tensor="layers.0.lora_A",
    kind="gradient",
    step=1,
    rank=0,
    index=(slice(0, 2), slice(0, 3)),
    mode="bound",
    worst=0.5,
    limit=1.0,
    ratio=0.5,
    passed=True,
    clauses=("D1", "S3"),
)
VACUOUS = dataclasses.replace(CHECK, vacuous="empty shard")
FAILED = dataclasses.replace(CHECK, worst=4.0, ratio=4.0, passed=False, evidence=Evidence(at=(1, 2), got=5.0, want=1.0))
SCHEMA = json.loads(files("parity").joinpath("results.schema.json").read_text(encoding="utf-8"))


def result(status="passed", checks=(CHECK,), **more):
    """One case."""
    case = dataclasses.replace(CASE, **{k: more.pop(k) for k in ("link", "clauses") if k in more})
    return CaseResult(case=case, implementation="torch_impl", status=status, seconds=0.25, checks=checks, **more)


def stream(*cases, seconds=2.0):
    """A run."""
    return Results(environment=describe("cpu"), tier="quick", cases=list(cases), seconds=seconds)


# what holds


def test_a_complete_run_whose_checks_pass_holds():
    """A footer, a check, no failure, no bare clause."""
    assert stream(result()).holds


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(stream(result(), seconds=None), id="without a footer"),
        pytest.param(stream(), id="no case"),
        pytest.param(stream(result("skipped", (), reason="no weights")), id="all skipped"),
        pytest.param(stream(result(checks=(VACUOUS,))), id="all vacuous"),
        pytest.param(stream(result(), result("failed", (FAILED,))), id="a failed case"),
        pytest.param(stream(result(), result("error", (), reason="rank 1 raised")), id="an error"),
        pytest.param(stream(result(), result(checks=(VACUOUS,), clauses=("D7",))), id="a bare clause"),
    ],
)
def test_anything_less_does_not_hold(run):
    """A run that is unfinished, empty, vacuous, broken or bare in one clause does not hold."""
    assert not run.holds


def test_a_vacuous_check_beside_a_real_one_is_no_harm():
    """A clause that one check bears on is shown."""
    assert stream(result(checks=(CHECK, VACUOUS))).holds


def test_a_check_shows_its_own_clauses_alone():
    """A clause that the case claims, and none of whose checks bears on, is not shown."""
    assert stream(result(clauses=("D1", "S3", "D5"))).unproven_clauses() == ["D5"]


def test_who_is_compared_with_itself_alone_is_not_judged():
    """An implementation whose every value is 7 agrees with itself: that is no reason to hold."""
    alone = result(checks=(dataclasses.replace(CHECK, against="twin"),))

    assert stream(alone).unjudged() == ["torch_impl"]
    assert not stream(alone).holds
    assert stream(alone, result()).holds


def test_gradients_against_the_reference_are_counted_first():
    """What is compared with the twin, or with itself, is counted apart from what the reference says."""
    checks = (CHECK, dataclasses.replace(CHECK, against="twin"), dataclasses.replace(CHECK, against="declared"))

    counts = stream(result(checks=checks)).by_group()

    assert {group: count for group, count in counts.items() if count} == {"independent": 1, "twin": 1, "frozen": 1}
    assert next(iter(counts)) == "independent"


def test_a_skipped_case_claims_nothing():
    """Clauses of skipped cases are not missed: the skip itself is counted."""
    assert stream(result(), result("skipped", (), reason="no weights", clauses=("S12",))).unproven_clauses() == []


def test_a_control_proves_no_clause():
    """That a planted bug is found does not show that the clause holds."""
    bare = result(checks=(VACUOUS,), clauses=("D5",))
    control = result(link="controls", checks=(dataclasses.replace(CHECK, clauses=("D5",)),), clauses=("D5",))

    assert stream(bare, control).unproven_clauses() == ["D5"]


# what is counted


def test_the_summary_counts():
    """Cases, non-vacuous checks, vacuous ones, failures and skips are counted apart."""
    run = stream(
        result(checks=(CHECK, CHECK, VACUOUS)),
        result("failed", (dataclasses.replace(CHECK, clauses=("D1", "D2")), FAILED), link="frameworks"),
        result("error", (), reason="rank 0 raised"),
        result("skipped", (), reason="no weights"),
    )

    summary = run.summary()

    counts = {key: summary[key] for key in ("cases", "checks", "vacuous", "failed", "skipped")}
    assert counts == {"cases": 4, "checks": 4, "vacuous": 1, "failed": 2, "skipped": 1}
    assert summary["by_link"] == {"shards": 2, "frameworks": 2}
    assert summary["by_clause"] == {"D1": 4, "D2": 1, "S3": 3}


def test_the_worst_ratio_is_that_of_bounds():
    """The largest difference over its bound is kept; equality has no part in it."""
    equal = dataclasses.replace(CHECK, mode="bitwise", ratio=0.0)

    assert stream(result(checks=(equal, CHECK))).summary()["worst_ratio"] == 0.5
    assert stream(result(checks=(equal,))).summary()["worst_ratio"] is None


def test_failures_come_with_the_worst_first():
    """What fails equality, or is furthest beyond its bound, is shown first."""
    unequal = dataclasses.replace(FAILED, ratio=None)
    worse = dataclasses.replace(FAILED, ratio=9.0)

    assert worst_of([FAILED, CHECK, worse, unequal]) == [unequal, worse, FAILED]


# the file


def problems(content):
    """What the schema has against it."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(content)]


def test_the_schema_is_a_schema():
    """The file that the package ships is a JSON Schema of 2020-12."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


ODD = dataclasses.replace(
    FAILED, worst=math.inf, limit=math.nan, ratio=None, evidence=Evidence(at=(), got=math.nan, want=-math.inf)
)
LOST = "coverage: 3 of 12 elements on no rank"
MISSING = dataclasses.replace(FAILED, rank=-1, index=(), mode="", fault=LOST, evidence=None)
STATE = dataclasses.replace(CHECK, kind="optimizer:momentum_buffer")


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(stream(result(checks=(CHECK, VACUOUS, STATE))), id="passed"),
        pytest.param(stream(result("failed", (FAILED, ODD, MISSING), looks_like="SumForMean")), id="failed"),
        pytest.param(stream(result("skipped", (), reason="no weights")), id="skipped"),
        pytest.param(stream(result("error", (), reason="rank 1 raised"), seconds=None), id="incomplete"),
        pytest.param(stream(), id="empty"),
    ],
)
def test_every_stream_is_valid(run, tmp_path):
    """What is written is JSON by the standard, and of the form that the schema gives."""
    write_json(tmp_path / "results.json", run.as_json())

    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert problems(json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))) == []


def changed(*path, to):
    """A valid stream with one value changed."""
    content = stream(result(), result("skipped", (), reason="no weights")).as_json()
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(changed("schema", to=2), id="schema"),
        pytest.param(changed("complete", to=False), id="seconds without a footer"),
        pytest.param(changed("summary", "checks", to=-1), id="negative count"),
        pytest.param(changed("cases", 0, "status", to="green"), id="unknown status"),
        pytest.param(changed("cases", 0, "checks", to=[]), id="passed without a check"),
        pytest.param(changed("cases", 0, "status", to="failed"), id="failed without a failed check"),
        pytest.param(changed("cases", 0, "checks", 0, "passed", to=False), id="passed with a failed check"),
        pytest.param(changed("cases", 0, "checks", 0, "index", to="0:2"), id="index"),
        pytest.param(changed("cases", 0, "checks", 0, "ratio", to="0.5"), id="ratio"),
        pytest.param(changed("cases", 1, "reason", to=""), id="skipped without a reason"),
        pytest.param(changed("surprise", to=1), id="unknown field"),
    ],
)
def test_the_schema_refuses(content):
    """A file that contradicts itself or holds what nobody described is not of this form."""
    assert problems(content) != []


def test_an_incomplete_stream_says_so():
    """Without its footer a stream is marked incomplete."""
    written = stream(result(), seconds=None).as_json()

    assert (written["complete"], written["seconds"]) == (False, None)


def test_an_index_is_written_in_words():
    """The part of the tensor reads as slices."""
    assert stream(result()).as_json()["cases"][0]["checks"][0]["index"] == "[0:2, 0:3]"


def test_arrays_are_never_written():
    """What a failed check keeps for the diagnosis stays out of the file."""
    kept = dataclasses.replace(FAILED, got=np.ones(3), want=np.zeros(3))

    (written,) = stream(result("failed", (kept,))).as_json()["cases"][0]["checks"]

    assert {"got", "want"} & set(written) == set()


def test_writing_replaces_in_one_step(tmp_path):
    """A file that cannot be written leaves the old one as it was, and nothing beside it."""
    place = tmp_path / "results.json"
    write_json(place, {"a": 1})

    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(place, {"a": math.nan})

    assert json.loads(place.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [place]


def test_writing_makes_the_folder(tmp_path):
    """A folder that is not there yet is made."""
    write_json(tmp_path / "a" / "b" / "results.json", [])

    assert (tmp_path / "a" / "b" / "results.json").exists()
