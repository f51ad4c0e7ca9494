"""A claim is earned where the clause's bug was seen to fail, and only as long as nothing of it has changed."""

import dataclasses
import json
import re

import pytest

from parity.bugs.known import BUGS
from parity.bugs.record import Bug
from parity.case import Case
from parity.cases import cases_of
from parity.checks.shard_check import Check
from parity.implementations import jax_mutants
from parity.implementations.mutants import MUTANTS
from parity.report import digests, earned
from parity.report.results import CaseResult

CASE = next(case for case in cases_of("quick") if case.id == "stack/bound/torch_impl/none-w1/uneven/nf4-float32/plain")
RIGHT = Check(
    tensor="layers.0.lora_A",
    kind="gradient",
    step=1,
    rank=0,
    index=(),
    mode="bound",
    worst=0.5,
    limit=1.0,
    ratio=0.5,
    passed=True,
    clauses=("D1", "D5"),
)
WRONG = dataclasses.replace(RIGHT, passed=False, worst=4.0, ratio=4.0)
RUN = CaseResult(case=CASE, implementation="torch_impl", status="passed", seconds=0.1, checks=(RIGHT,))
FAILED = dataclasses.replace(RUN, implementation="mutant:NormNotDetached", status="failed", checks=(WRONG,))
D1 = ("D1", CASE.id, "gradient", "lora_A")
D5 = ("D5", CASE.id, "gradient", "lora_A")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep what `NormNotDetached` made fail, `changes` made to the file, and read it instead of the committed one."""

    def keep(*ran, **changes):
        file = tmp_path / "earned.json"
        earned.write_earned(file, [("NormNotDetached", FAILED, ("D5",))], ran or ("ref.dora.forward",))
        content = json.loads(file.read_text(encoding="utf-8"))
        monkeypatch.setattr(earned, "_committed", lambda: content | changes)
        return content

    return keep


def test_a_failure_earns_its_own_clause(kept):
    """Of the clauses that a check names, a bug earns those that it violates, where it was seen."""
    kept()
    account = earned.account_of([RUN])

    assert account.claims == {D1, D5}
    assert account.earned == {D5}
    assert (account.clauses, account.bare, account.stale) == (["D5"], ["D1"], 0)


def test_what_nobody_ran_earns_nothing(kept):
    """A clause whose named functions never ran is not earned."""
    kept("ref.dora.scaling")

    assert earned.account_of([RUN]).earned == frozenset()


def test_nothing_is_earned_without_a_file(monkeypatch):
    """An absent file earns nothing, and leaves all functions to tests."""
    monkeypatch.setattr(earned, "_committed", dict)
    account = earned.account_of([RUN])

    assert account.earned == frozenset()
    assert "ref.dora.scaling" in account.idle


@pytest.mark.parametrize("part", ["judge", "mutants", "cases"])
def test_what_has_changed_earns_nothing(kept, part):
    """Another judge, mutant or case of that name: the entry is stale, and counted as such."""
    was = kept()[part]
    kept(**{part: "other" if part == "judge" else dict.fromkeys(was, "other")})
    account = earned.account_of([RUN])

    assert (account.earned, account.stale) == (frozenset(), 1)


def test_a_changed_function_has_not_run(kept):
    """What ran was another function of that name."""
    kept(functions={"ref.dora.forward": "other"})
    account = earned.account_of([RUN])

    assert (account.earned, account.stale) == (frozenset(), 1)
    assert "ref.dora.forward" in account.idle


def test_another_case_earns_nothing_for_this_one(kept):
    """Claims belong to a case: what failed there says nothing of here."""
    kept()
    other = dataclasses.replace(RUN, case=dataclasses.replace(CASE, strategy="fsdp2", world=2))

    assert earned.account_of([other]).earned == frozenset()


def test_a_digest_sees_declarations_and_not_seeds():
    """Another field is another case; the seed only changes what is drawn."""
    assert digests.case_digest(CASE) == digests.case_digest(dataclasses.replace(CASE, seed=1))
    assert digests.case_digest(CASE) != digests.case_digest(dataclasses.replace(CASE, rank=8))


def test_a_digest_sees_code_and_not_words(tmp_path, monkeypatch):
    """Docstrings, comments and empty lines may change; a constant may not."""
    first = tmp_path / "shard.py"

    def digest(text):
        first.write_text(text, encoding="utf-8")
        digests.judge_digest.cache_clear()
        digests._tree.cache_clear()
        digests._code_lines.cache_clear()
        return digests.judge_digest()

    monkeypatch.setattr(digests, "ROOM", tmp_path)
    plain = digest("def f(x):\n    return 2 * x\n")
    told = digest('def f(x):\n    """Twice."""\n\n    return 2 * x  # twice\n')
    other = digest("def f(x):\n    return 3 * x\n")
    digests.judge_digest.cache_clear()

    assert plain == told
    assert plain != other


def test_a_digest_is_made_of_lines(tmp_path):
    """What is digested depends on the version of Python, as trees and their dumps do."""
    file = tmp_path / "file.py"
    file.write_text(
        '"""Doc."""\n\n@cache\ndef f(x):\n    """Doc,\n\n    long."""\n    y = f"{x!r:>4}"  # "#"\n    return y\n',
        "utf-8",
    )
    (_, f) = digests._tree(file).body

    assert digests._said(file, f) == '@cache\ndef f(x):\n    y = f"{x!r:>4}"\n    return y'


def test_every_named_function_has_a_digest():
    """Each function that SPEC.md names is found in the file that its path says."""
    named = {path for paths in digests.named_functions().values() for path in paths if path.startswith("ref.")}

    assert named - set(digests.function_digests()) == set()


def test_each_record_has_its_mutant():
    """A bug that is recorded can be planted, and has a digest."""
    assert set(BUGS) == {*MUTANTS, *jax_mutants.MUTANTS}
    assert set(BUGS) <= set(digests.mutant_digests())


def test_a_clause_that_a_bug_violates_is_claimed_where_it_is_tried():
    """Some case of each bug's plan claims one of its clauses: else its failure could earn nothing."""
    from parity.commands.expression import compile_expression  # noqa: PLC0415 - beside its one use

    quick = cases_of("quick")

    def meets(bug: Bug, case: Case) -> bool:
        return case.subject == bug.subject and bool(set(bug.clauses) & set(case.clauses))

    bare = [
        name
        for name, bug in BUGS.items()
        if not any(meets(bug, case) for case in quick if compile_expression(bug.keep)(case))
    ]

    assert bare == []


def test_spec_lists_what_rests_on_tests_alone():
    """The last section of SPEC.md names, for each clause, the functions that no case of the quick tier ran."""
    idle = set(earned.account_of([]).idle)
    _, _, section = (digests._reference() / "SPEC.md").read_text(encoding="utf-8").partition("\n## What rests on tests")
    listed = {part.partition(":")[0]: set(re.findall(r"`(ref\.[\w.]+)`", part)) for part in section.split("\n- ")[1:]}
    wanted = {clause: idle.intersection(names) for clause, names in digests.named_functions().items()}

    assert listed == {clause: names for clause, names in wanted.items() if names}
