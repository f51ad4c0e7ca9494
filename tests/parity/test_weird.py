"""Whatever a third party's implementation does: a run holds only where its values are right, and always ends.

`weird.py` has the implementations; the tables below say what becomes of each. The judge's own process reads what they
send as data, so none of them changes it.
"""

import ast
from pathlib import Path
from unittest import mock

import psutil
import pytest

import parity.pipeline
from parity.cases import cases_of
from parity.checks import shard_check
from parity.pipeline import MOST_HANGS, Pipeline
from parity.report.results import Results
from parity.workers import torch_ranks
from parity.workers.memory import GIB

pytestmark = pytest.mark.distributed

HANG_SECONDS = 3.0
START_SECONDS = 60.0
"""Within which the ranks have started, on a busy machine too; with the hang far below a case's limit of two minutes."""
MEMORY = 2 * GIB
PLAIN = "uneven/float32-float32/plain"
CASES = {
    case.id.split("/")[3]: case
    for case in cases_of("quick")
    if case.id in {f"stack/lattice/torch_impl/none-w1/{PLAIN}", f"stack/lattice/torch_impl/fsdp2-w2/{PLAIN}"}
}
"""Unsharded against the oracle, and two ranks against unsharded."""

HOLDS = [
    "Good",
    "PrintsVerdict",
    "ClosesOutputs",
    "KillsParent",
    "Forks",
    "ForksSleeper",
    "StartsSleeper",
    "StartsDaemon",
    "ChangesFolder",
    "SpoilsInputs",
    "Strided",
    "OtherRank",
    "Twice",
    "Extra",
    "AddsFunction",
    "OwnClass",
    "RefusesEmpty",
    "gives_good",
]
"""Odd, and right in all that is compared."""

NOT_RAN = {
    "Raises": "rank 0 raised RuntimeError: multi line message xxx",
    "RaisesEscapes": "raised RuntimeError: ?[31mred?[0m ? backwards (weird.py:",
    "RaisesInRefuses": "raised ValueError: in refuses",
    "RaisesInInit": "raised ValueError: in init",
    "NeedsArgs": "missing 1 required positional argument",
    "RaisesWithoutText": "raised Unprintable: its text cannot be had",
    "Exits": "rank 0 raised SystemExit: 0 (weird.py:",
    "LeavesAtOnce": "ended with status 0",
    "KeyboardInterrupts": "raised KeyboardInterrupt",
    "RaisesBase": "raised OwnBaseError: base",
    "GeneratorExits": "raised GeneratorExit",
    "StopsIteration": "generator raised StopIteration",
    "Recurses": "raised RecursionError",
    "Faults": "ended by SIGSEGV",
    "Aborts": "ended by SIGABRT",
    "Allocates": "rank 0 needed more than 2.0 GiB (weird.py:",
    "AllocatesTensor": "rank 0 needed more than 2.0 GiB (weird.py:",
    "GrowsSlowly": "rank 0 needed more than 2.0 GiB (weird.py:",
    "ClosesEverything": "rank 0 of 1 (pid ",
    "Complex": "array is ndarray of complex64",
    "LongDouble": "array is ndarray of float128",
    "BigEndian": "array is ndarray of >f4",
    "Structured": "array is ndarray of [('a', '<f4')]",
    "Void": "array is ndarray of |V4",
    "Objects": "array is ndarray of object",
    "Strings": "array is ndarray of <U32",
    "Masked": "array is MaskedArray of float32",
    "Matrices": "array is matrix of float32",
    "Lies": "array is _AlwaysEqual of float32",
    "PatchesJudge": "array is _RunsWhereUnpickled of float32",
    "WithoutValues": "array is None",
    "HugeArray": "100000000 values, of a tensor of shape (4, 96)",
    "SteppedIndex": "wanted slices with start, stop and no step",
    "HugeIndex": "wanted slices with start, stop and no step",
    "IntegerIndex": "index is tuple '(0,)'",
    "ListedShape": "global_shape is list '[4, 96]'",
    "NoShape": "global_shape is None",
    "NoName": "name is None, wanted printable text",
    "ListedName": "name is list",
    "LongName": "name is text of 1000000 characters",
    "EscapedName": "name is str '\\x1b[31mred', wanted printable text",
    "NoKind": "kind is None",
    "WrittenStep": "step is str '1'",
    "FloatStep": "step is float '0.0'",
    "Forced": "rank 0 sent what is no answer: name is None",
    "ForcedValues": "rank 0 raised AttributeError",
    "NoneForShards": "'NoneType' object is not iterable",
    "TextForShards": "it gave a str, wanted a Shard",
    "NumbersForShards": "it gave a int, wanted a Shard",
    "NeverEnds": "it gave more than 65536 shards",
    "RefusesNumber": "refuses gave a int, wanted a reason or None",
    "OddUnits": "units is int '7'",
    "WritesGarbage": "rank 0 sent what is no answer: it begins with the bytes b'\\x00\\x00\\x00\\x08\\xff",
    "WritesPickle": "rank 0 sent what is no answer: it begins with the bytes",
    "WritesStale": "rank 0 sent what is no answer: it answers another job",
    "WritesHugeHeader": "rank 0 sent what is no answer: its header is to have 4294967295 bytes",
    "WritesHugeBody": f"rank 0 sent what is no answer: its body is to have {2**60} bytes",
    "WritesDeep": "rank 0 sent what is no answer: its header cannot be read: RecursionError",
    "NO_CLASS": "'int' object is not callable",
    "INSTANCE": "'Good' object is not callable",
    "gives_none": "'NoneType' object has no attribute 'refuses'",
}
"""The case's error, in one line that has these words; the rank that gave no answer is named."""

WRONG = {
    "Wider": "dtype float64, wanted float32",
    "Half": "dtype float16, wanted float32",
    "PatchesJudgeInRank": "bitwise",
    "PatchesJudgeByName": "bitwise",
    "NanGradients": "bitwise",
    "AllNan": "bitwise",
    "InfiniteGradients": "bitwise",
    "Zero": "bitwise",
    "Constant": "bitwise",
    "Broadcast": "bitwise",
    "Integers": "dtype int64, wanted float32",
    "Booleans": "bitwise",
    "RightTheSecondTime": "bitwise",
    "WholeForPart": "bitwise",
    "ShiftedIndex": "place: 1:5 is outside 0:4",
    "NegativeIndex": "place: -4:0 is outside 0:4",
    "EmptyShards": "coverage: 384 of 384 elements on no rank",
    "OtherShape": "wanted (4, 96)",
    "MarkedKind": "coverage",
    "NoShards": "coverage",
    "ChangesCase": "coverage",
}
"""Unsharded, a failed check says this."""

WRONG_WHERE_SHARDED = {
    "WholeIndex": "place: shape (2, 96)",
    "KillsPeer": "rank 0 of 2",
    "LeavesGroup": "Process group cannot be None",
}
"""Right unsharded; with two ranks a check or the reason says this."""

REFUSED = {
    "RefusesAll": "no",
    "RefusesMarkup": "[bold]x[/red] [/] ?[31m",
    "RefusesLong": "x" * 997 + "...",
}
"""Skipped, with this reason: nothing was shown, and nothing holds."""

HANGS = ["StopsItself", "Hangs", "HangsInC", "IgnoresSignals", "StopsAmidAnswer"]
"""No answer in time."""

ELSEWHERE = ["StartsDaemonAndSleeps", "Changed"]
"""In `test_endings.py`, or the base of others."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A pipeline with short limits; leaving it leaves no process that a subject started."""
    with mock.patch.object(torch_ranks, "rank_memory", return_value=MEMORY):
        with Pipeline(cache=tmp_path_factory.mktemp("cache"), seconds=60.0) as running:
            yield running
            started = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
        _, left = psutil.wait_procs(started, timeout=10)
        assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture
def run(judge):
    """Run an implementation on these cases: what a command would say of it, and the results."""

    def start(name, *worlds):
        results = list(judge.run((CASES[world], f"weird:{name}") for world in worlds or CASES))
        return Results(environment={}, tier="quick", cases=results, seconds=1.0)

    yield start
    assert parity.pipeline.check_shard is shard_check.check_shard


def said(result):
    """All words of a result: its reason, and the modes of its failed checks."""
    return "\n".join([result.reason, *(check.fault or check.mode for check in result.checks if not check.passed)])


@pytest.mark.parametrize("name", HOLDS)
def test_what_is_right_holds(run, name):
    """An implementation whose values are right holds, whatever else it does."""
    done = run(name)

    assert (done.holds, [said(result) for result in done.cases]) == (True, ["", ""])


@pytest.mark.parametrize("name", NOT_RAN)
def test_an_odd_answer_is_its_case_s_error(run, name):
    """A rank that gives no answer, or none that can be read, is an error that names it, in one printable line."""
    (result,) = run(name, "none-w1").cases

    assert result.status == "error"
    assert NOT_RAN[name] in result.reason
    assert result.reason.isprintable()
    assert len(result.reason) <= 1000


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_never_hold(run, name):
    """Values that are wrong in every place fall short, unsharded by a failed check."""
    done = run(name)

    assert not done.holds
    assert done.cases[0].status == "failed"
    assert WRONG[name] in said(done.cases[0])


@pytest.mark.parametrize("name", WRONG_WHERE_SHARDED)
def test_what_is_wrong_where_sharded_never_holds(run, name):
    """What only goes wrong with two ranks falls short there alone."""
    done = run(name)

    assert not done.holds
    assert done.cases[0].status == "passed"
    assert WRONG_WHERE_SHARDED[name] in said(done.cases[1])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_shows_nothing(run, name):
    """A refused case is skipped, its reason printable and cut; a run of such cases does not hold."""
    done = run(name)

    assert not done.holds
    assert {(result.status, result.reason) for result in done.cases} == {("skipped", REFUSED[name])}


@pytest.mark.long
@pytest.mark.parametrize("name", HANGS)
def test_a_hang_is_named_in_time(judge, run, name):
    """A rank that gives no whole answer is ended at the limit, however it hangs."""
    with mock.patch.object(judge, "_seconds", HANG_SECONDS):
        (result,) = run(name, "none-w1").cases

    assert result.status == "error"
    assert f"no answer within {HANG_SECONDS:g} s from rank 0 at" in result.reason
    assert result.seconds < HANG_SECONDS + START_SECONDS


@pytest.mark.long
def test_who_hangs_again_and_again_is_not_asked_again(judge):
    """After three cases without an answer in time the rest are errors at once; another implementation is asked."""
    cases = [(CASES["none-w1"], "weird:Hangs")] * (MOST_HANGS + 2)
    judge._hangs.clear()
    with mock.patch.object(judge, "_seconds", 1.0):
        *hung, fourth, fifth = judge.run(cases)
    (other,) = judge.run([(CASES["none-w1"], "weird:Good")])

    assert all("no answer within 1 s" in result.reason for result in hung)
    assert fourth.reason == fifth.reason == "not run: weird:Hangs is hanging, it gave no answer 3 times in a row"
    assert fifth.seconds < 0.1
    assert other.status == "passed"


def test_who_kills_the_fork_server_harms_no_other(run):
    """The ranks of the next case come from a new fork server."""
    run("KillsParent")
    done = run("Good")

    assert done.holds


def test_the_tables_are_whole():
    """Every implementation of `weird.py` is in one table, once."""
    tree = ast.parse((Path(__file__).parent / "weird.py").read_text(encoding="utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
    others = {"NO_CLASS", "INSTANCE", "gives_good", "gives_none"}
    tables = [*HOLDS, *NOT_RAN, *WRONG, *WRONG_WHERE_SHARDED, *REFUSED, *HANGS, *ELSEWHERE]

    assert sorted(tables) == sorted(classes - {"Layer", "OwnBaseError", "Unprintable"} | others)
