"""The declared cases: each has its own name, cites clauses that exist, and between them no clause is left bare."""

import re
from collections import Counter
from importlib.resources import files

import pytest

from parity.bugs.known import FLAGS
from parity.bugs.plans import PLANS
from parity.case import LINKS
from parity.cases import TIERS, cases_of
from parity.commands.choose import choose
from parity.commands.expression import compile_expression
from parity.commands.options import Selection

SPECIFIED, _, _ = files("ref").joinpath("SPEC.md").read_text(encoding="utf-8").partition("\n## Later")
CLAUSES = re.findall(r"^### (\S+)", SPECIFIED, flags=re.MULTILINE)
EACH_TIER = pytest.mark.parametrize("tier", TIERS)
QUICK = cases_of("quick")


@EACH_TIER
def test_identifiers_are_unique(tier):
    """An identifier is one case's."""
    counts = Counter(case.id for case in cases_of(tier))

    assert [name for name, count in counts.items() if count > 1] == []


def test_the_full_tier_has_the_quick_one():
    """Whatever the quick tier shows, the full one shows as well."""
    assert {case.id for case in QUICK} - {case.id for case in cases_of("full")} == set()


@EACH_TIER
def test_cited_clauses_exist(tier):
    """Every clause that a case declares is a heading of SPEC.md."""
    cited = {clause for case in cases_of(tier) for clause in case.clauses}

    assert cited - set(CLAUSES) == set()


@EACH_TIER
def test_every_case_cites_clauses_once(tier):
    """A case declares at least one clause, and none twice."""
    assert [case.id for case in cases_of(tier) if not case.clauses or len(set(case.clauses)) < len(case.clauses)] == []


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_has_a_case(clause):
    """No clause is without a case of the quick tier that declares it."""
    assert any(clause in case.clauses for case in QUICK)


def test_the_quick_tier_is_large_enough():
    """A hundred cases or more, of every link that has cases."""
    assert len(QUICK) >= 100
    assert {case.link for case in QUICK} == set(LINKS) - {"controls"}


def test_replaying_a_case_chooses_it_alone():
    """`-k` with a whole identifier chooses that case, also where it begins another's."""
    begins = next(case.id for case in QUICK if any(other.id.startswith(f"{case.id}+") for other in QUICK))

    assert [case.id for case in choose(Selection(keep=begins))] == [begins]


def test_a_twin_is_unsharded():
    """What link 2 compares with runs in one process, under no strategy and with nothing cast on the wire."""
    twins = {case.unsharded_twin() for case in QUICK if case.link == "shards"}

    assert {(twin.world, twin.strategy, twin.param_dtype) for twin in twins} == {(1, "none", None)}


@pytest.mark.parametrize("case", [c for c in QUICK if c.proof == "one-hot"], ids=lambda case: case.id)
def test_every_rank_is_hot_once(case):
    """A one-hot case has a step for each rank, since what a rank does wrong shows when it is hot."""
    assert {case.hot_rank(step) for step in range(case.steps)} == set(range(case.world))


@pytest.mark.parametrize("name", PLANS)
def test_mutants_have_cases(name):
    """The cases that a mutant is tried on exist, and belong to the implementation that it mutates."""
    matches = compile_expression(PLANS[name].keep)

    assert [case.id for case in QUICK if matches(case) and case.subject == "torch_impl"] != []


def test_every_flag_has_a_plan():
    """A known bug has a mutant, and a mutant a known bug."""
    assert set(FLAGS) == set(PLANS)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_cite_clauses_that_exist(name):
    """A known bug violates clauses of SPEC.md."""
    assert FLAGS[name].clauses
    assert set(FLAGS[name].clauses) - set(CLAUSES) == set()
