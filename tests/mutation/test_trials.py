"""A mutant's fate, its record, and the list of those that change nothing."""

import os
from pathlib import Path

import pytest
import warm
from chart import Chart
from copies import Copy
from operators import mutants_of
from report import Report, read_equivalents
from trials import Outcome, Step, Trials, append_outcome, plan, read_outcomes
from warm import Ending

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EQUIVALENTS = read_equivalents(HERE / "equivalent.toml")


def outcome(*, line: int = 1, killed_by: str = "") -> Outcome:
    """Of a mutant of `file.py`."""
    return Outcome("file.py", line, "constant", f"x = {line}", str(line), "0", 0, killed_by, "", 1.0)


@pytest.fixture
def project(tmp_path: Path) -> Copy:
    """A copy of a project of one file."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "file.py").write_text("x = a + b\n")
    made = Copy.__new__(Copy)
    made.root = made.folder = tmp_path / "project"
    return made


def test_a_copy_is_right_again_after_a_mutant(project):
    """A mutant stays in the copy, or is never there."""
    (mutant,) = mutants_of("file.py", (project.folder / "file.py").read_bytes())

    with project.with_mutant(mutant):
        wrong = (project.folder / "file.py").read_text()

    assert (wrong, (project.folder / "file.py").read_text()) == ("x = (a - b)\n", "x = a + b\n")


def test_what_was_compiled_is_forgotten(project):
    """The right file's compiled code is loaded for the wrong file."""
    compiled = project.folder / "__pycache__" / "file.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.touch()
    (mutant,) = mutants_of("file.py", (project.folder / "file.py").read_bytes())

    with project.with_mutant(mutant):
        there = compiled.exists()

    assert not there


def test_outcomes_survive_a_cut_line(tmp_path):
    """A run that was interrupted while it wrote cannot be resumed."""
    path = tmp_path / "results" / "mutation.jsonl"
    append_outcome(path, outcome(line=3))
    with path.open("a") as file:
        file.write('{"file": "fi')

    assert list(read_outcomes(path)) == [outcome(line=3)]


def test_only_survivors_on_changed_lines_fail_a_change():
    """A survivor elsewhere fails the change, or one in its lines passes."""
    report = Report(9, (outcome(line=1), outcome(line=2), outcome(line=3, killed_by="case")), {}, {"file.py": {2, 3}})

    assert report.blocking == [outcome(line=2)]


def test_a_listed_survivor_fails_nothing():
    """A mutant that is listed as equivalent fails the run."""
    report = Report(9, (outcome(), outcome(line=2)), {outcome().key: "because"}, None)

    assert report.blocking == [outcome(line=2)]


def test_the_rate_counts_what_is_listed_as_survived():
    """The rate before listing leaves listed survivors out."""
    report = Report(9, (outcome(), outcome(line=2, killed_by="test")), {outcome().key: "because"}, None)

    assert "killed before listing: 50.0 % of those tried" in list(report.lines())


@pytest.fixture
def chart(tmp_path: Path) -> Chart:
    """A map of three test files, begun when they were ten seconds old."""
    for name in ("file.py", "slow.py", "quick.py", "other.py"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (990, 990))
    (tmp_path / "map").write_text(
        '{"begun": 1000}\n'
        '{"test": "slow.py::a", "seconds": 2, "lines": {"file.py": [1]}}\n'
        '{"test": "quick.py::b", "seconds": 1, "lines": {"file.py": [1, 2]}}\n'
        '{"test": "quick.py::c", "seconds": 1, "lines": {"file.py": [3]}}\n'
        '{"test": "other.py::d", "seconds": 1, "lines": {"file.py": [1]}}\n'
    )
    return Chart(tmp_path / "map", tmp_path)


def narrowed(chart: Chart) -> tuple[str, ...]:
    """What of two test files is run for a mutant of the first line."""
    (mutant,) = mutants_of("file.py", b"x = 1\n")
    return Step("test", ("slow.py", "quick.py")).narrowed(chart, mutant).arguments


def test_tests_that_run_the_line_are_taken_quickest_first(chart):
    """A test of another file or line is taken, or a slow one comes first."""
    assert narrowed(chart) == ("quick.py::b", "slow.py::a")


def test_a_test_file_that_is_newer_than_the_map_is_taken_whole(chart, tmp_path):
    """A test that was added is never run, or one that was removed counts as failing."""
    os.utime(tmp_path / "quick.py", (1001, 1001))

    assert narrowed(chart) == ("slow.py::a", "quick.py")


def test_a_source_file_that_is_newer_than_the_map_has_all_tests(chart, tmp_path):
    """A mutant is tried by the tests of another line, which stood there when the map was made."""
    os.utime(tmp_path / "file.py", (1001, 1001))

    assert narrowed(chart) == ("slow.py", "quick.py")


def test_a_line_that_the_map_lacks_has_all_tests():
    """A mutant outside of functions is tried by no test."""
    (mutant,) = mutants_of("file.py", b"x = 1\n")

    assert Step("test", ("a.py",)).narrowed(Chart(), mutant) == Step("test", ("a.py",))


@pytest.mark.parametrize(
    ("again", "killed_by"),
    [(Ending(0, 300, ""), ""), (Ending(1, 300, ""), "test"), (Ending(None, 420, ""), "time")],
    ids=["passes", "fails", "hangs"],
)
def test_what_ran_out_of_time_is_tried_again_at_todays_pace(project, monkeypatch, again, killed_by):
    """A mutant counts as hung because the machine has become slower since its tests were measured."""
    endings = iter([Ending(0, 10, ""), Ending(None, 60, ""), Ending(0, 100, ""), again])
    limits = []
    monkeypatch.setattr(warm, "run", lambda *_, seconds, **__: limits.append(seconds) or next(endings))
    (mutant,) = mutants_of("file.py", (project.folder / "file.py").read_bytes())

    became = Trials(project, {"file.py": [Step("ranks", ("a.py",))]}, Chart()).try_mutant(mutant)

    assert became.killed_by == killed_by
    assert limits == [600, 60, 600, 420]


@pytest.mark.parametrize("path", plan(HERE / "plan.toml"))
def test_the_plan_names_files_that_exist(path):
    """A file of the plan was moved, so that none of its mutants is made any more."""
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("key", EQUIVALENTS, ids=lambda key: " | ".join(map(str, key)))
def test_a_listed_mutant_still_exists(key):
    """The list has a mutant of a line that is no longer there."""
    keys = {mutant.key for mutant in mutants_of(key[0], (ROOT / key[0]).read_bytes())}

    assert key in keys


@pytest.mark.parametrize("key", EQUIVALENTS, ids=lambda key: " | ".join(map(str, key)))
def test_a_listed_mutant_has_a_proof(key):
    """A mutant is listed without a sentence that says why nothing can tell it."""
    assert len(EQUIVALENTS[key].split()) > 5
