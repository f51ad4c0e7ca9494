"""A small real run: it holds and says so; with a bug planted it says what broke, where, and how to see it again."""

import json
import re
import shlex
from importlib.resources import files

import jsonschema
import pytest
from commands import run_command

pytestmark = pytest.mark.distributed

CASES = "fsdp2-w2/thin/float32-float32/plain"
LATTICE = f"stack/lattice/torch_impl/{CASES}"
SCHEMA = json.loads(files("parity").joinpath("results.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny(environment, tmp_path_factory):
    """Three cases of torch_impl: lattice, one-hot, bound; what was said, and what was written."""
    folder = tmp_path_factory.mktemp("tiny")
    done = run_command(["run", "-k", CASES, "--json", "new/results.json"], folder=folder, environment=environment)
    return done, json.loads((folder / "new" / "results.json").read_text(encoding="utf-8"))


def test_a_sound_run_exits_0(tiny):
    """What holds has exit status 0, nothing on stderr, and the verdict in the last line."""
    done, _ = tiny

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("HOLDS: 3 cases, ")


def test_a_sound_run_writes_a_valid_stream(tiny):
    """The file that --json names has the published form, complete."""
    _, written = tiny

    jsonschema.Draft202012Validator(SCHEMA).validate(written)
    assert written["complete"] is True


def test_every_rank_is_checked(tiny):
    """Gradients and parameters of A, B and the magnitude are checked on both ranks in each case."""
    _, written = tiny

    wanted = {(k, t, r) for k in ("gradient", "parameter") for t in ("lora_A", "lora_B", "magnitude") for r in (0, 1)}
    checked = [
        {(c["kind"], c["tensor"].rpartition(".")[2], c["rank"]) for c in case["checks"]} for case in written["cases"]
    ]
    assert [wanted - seen for seen in checked] == [set()] * 3


@pytest.fixture(scope="module")
def planted(environment, tmp_path_factory):
    """The same lattice with a sum for the mean."""
    arguments = ["run", "-k", LATTICE, "--impl", "mutant:SumForMean", "--json", "results.json"]
    folder = tmp_path_factory.mktemp("planted")
    done = run_command(arguments, folder=folder, environment=environment)
    return done, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_a_planted_bug_exits_1(planted):
    """What falls short has exit status 1, and says so last."""
    done, _ = planted

    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("FALLS SHORT: 1 cases, ")


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(r"FAILED \S+ \[mutant:SumForMean\]: \d+ of \d+ checks fail", id="case and implementation"),
        pytest.param(r"looks like SumForMean", id="the bug"),
        pytest.param(r"layers\.0\.lora_A gradient, step 1, rank 0 \[0:1, 0:40\]", id="tensor, rank and range"),
        pytest.param(r"got -?\d[\d.]*, want -?\d", id="got and want"),
        pytest.param(r"\(clauses [^)]*\bS3\b", id="clause"),
    ],
)
def test_a_planted_bug_is_told(planted, said):
    """A failure names the case, the implementation, the bug it looks like, the tensor, the place and the clause."""
    done, _ = planted

    assert re.search(said, done.stdout)


def test_the_replay_runs_the_same_case(planted, environment, tmp_path):
    """The command that a failure prints fails alike."""
    done, written = planted
    command = shlex.split(re.search(r"replay: dora-parity (.*)", done.stdout).group(1))

    again = run_command([*command, "--json", "again.json"], folder=tmp_path, environment=environment)

    repeated = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again.returncode == 1
    assert repeated["cases"][0]["checks"] == written["cases"][0]["checks"]


def test_fail_fast_stops(dora_parity, tmp_path):
    """--fail-fast ends at the first case that falls short, and the stream is not complete."""
    done = dora_parity("run", "-k", CASES, "--impl", "fakes:Swapped", "--fail-fast", "--json", "results.json")

    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert done.returncode == 1
    assert [case["status"] for case in written["cases"]] == ["failed"]
    assert written["complete"] is False
