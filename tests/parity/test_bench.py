"""`dora-parity bench`: rows are medians of rounds' ratios, limits decide the exit status, and no group can hang."""

import io
import json

import pytest
from rich.console import Console

from parity.bench import command, groups
from parity.bench.measure import Row, compare, take_turns
from parity.errors import CannotRun, NoCaseMatches

HOLDS = Row("linear-dora/lora", 2.0, 2.0, 1.0, 1.1)
FALLS_SHORT = Row("linear-dora/peft", 2.0, 2.0, 1.0, 0.65)
PEAK = Row("memory-dora/lora", 3 * 2**20, 2**20, 3.0, 1.1, "B")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run the command on rows that are given; its exit status, its text and its files' folder."""

    def run(*rows, keep="linear", **places):
        monkeypatch.setattr(command, "measure", lambda _: iter(rows))
        text = io.StringIO()
        console = Console(file=text, width=200)
        files = {"json": None, "plot": None} | {name: tmp_path / place for name, place in places.items()}
        return command.run_bench(keep, console=console, **files), text.getvalue(), tmp_path

    return run


def test_contenders_take_turns():
    """Each is run once a round, no one is always first, and warm-ups do not count."""
    order, ticks = [], iter(range(100))
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}

    seconds = take_turns(contenders, rounds=2, warmups=1, clock=lambda: float(next(ticks)))

    assert "".join(order) == "abc" + "bca" + "cab"
    assert seconds == {name: [1.0, 1.0] for name in "abc"}


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    """A round in which the machine was slow for both changes nothing."""
    row = compare("x", {"a": [1.0, 40.0, 3.0], "b": [2.0, 50.0, 1.0]}, ours="a", peer="b", limit=0.8)

    assert (row.ours_s, row.peer_s, row.ratio) == (3.0, 2.0, 0.8)
    assert row.holds


def test_a_limit_that_holds_is_status_0(bench):
    """All within their limits."""
    status, said, _ = bench(HOLDS, keep="linear-dora/lora")

    assert status == 0
    assert "1.000  1.100  holds" in " ".join(said.split()).replace(" ", "  ")


def test_a_limit_that_does_not_hold_is_status_1(bench):
    """One beyond its limit fails the command, and is named."""
    status, said, _ = bench(HOLDS, FALLS_SHORT)

    assert status == 1
    assert [line.split()[0] for line in said.splitlines() if "falls short" in line] == ["linear-dora/peft"]


def test_rows_are_written(bench):
    """The file has the rows, what they were measured on, and whether it is whole."""
    _, _, folder = bench(HOLDS, FALLS_SHORT, json="rows.json")

    content = json.loads((folder / "rows.json").read_text())
    assert content["complete"] is True
    assert content["environment"]["torch"]
    numbers = {"ours_s": 2.0, "peer_s": 2.0, "ratio": 1.0, "limit": 0.65}
    assert content["rows"][1] == {"name": "linear-dora/peft", **numbers, "holds": False, "unit": "s"}


@pytest.mark.parametrize("name", ["rows.svg", "rows.png"])
def test_rows_are_drawn(bench, name):
    """The picture is of the kind that its name says."""
    _, _, folder = bench(HOLDS, FALLS_SHORT, plot=name)

    assert (folder / name).read_bytes()[:5] in {b"<?xml", b"\x89PNG\r"}


def test_bytes_are_shown_as_bytes(bench):
    """Memory is no time."""
    _, said, _ = bench(PEAK, keep="memory")

    assert "3 MiB" in said
    assert "1 MiB" in said


def test_what_was_measured_before_a_failure_is_kept(bench, tmp_path):
    """A row that never comes is an error; those that came are in the file, which says that it is not whole."""
    with pytest.raises(CannotRun, match="no measurement of linear-dora/peft"):
        bench(HOLDS, json="rows.json")

    content = json.loads((tmp_path / "rows.json").read_text())
    assert (content["complete"], len(content["rows"])) == (False, 1)


def test_an_unknown_row_is_refused():
    """With the names that there are."""
    with pytest.raises(NoCaseMatches, match=r"'lineal'.*linear-dora/lora"):
        command.choose("lineal")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_place_that_cannot_be_written_is_one_line(called, tmp_path, option):
    """It is known before anything is measured."""
    (tmp_path / "blocked").write_text("a file, not a folder")

    done = called("bench", option, "blocked/rows.svg")

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "blocked/rows.svg cannot be written" in done.stderr
    assert "linear" not in done.stdout


def test_a_group_that_fails_says_why():
    """The last line of its process."""
    with pytest.raises(CannotRun, match=r"bench group nosuch: ModuleNotFoundError.*nosuch"):
        list(groups.measure("nosuch"))


def test_a_group_that_takes_too_long_is_ended(monkeypatch):
    """No measurement hangs."""
    monkeypatch.setattr(groups, "SECONDS", 0.2)

    with pytest.raises(CannotRun, match=r"bench group linear: no answer within 0.2 s"):
        list(groups.measure("linear"))
