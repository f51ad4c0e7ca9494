"""The declared cases: each has its own name, cites clauses that exist, and between them no clause is left bare."""

import ast
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from parity.bugs import diagnosis
from parity.bugs.known import BUGS, known_as
from parity.bugs.record import Signature
from parity.case import LINKS, SteppedCase
from parity.cases import TIERS, cases_of
from parity.commands.choose import choose
from parity.commands.expression import compile_expression
from parity.commands.options import Selection

SPECIFIED, _, _ = files("ref").joinpath("SPEC.md").read_text(encoding="utf-8").partition("\n## Later")
CLAUSES = re.findall(r"^### (\S+)", SPECIFIED, flags=re.MULTILINE)
EACH_TIER = pytest.mark.parametrize("tier", TIERS)
QUICK = cases_of("quick")
STEPPED = [case for case in QUICK if isinstance(case, SteppedCase)]


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
    twins = {case.unsharded_twin() for case in STEPPED if case.link == "shards"}

    assert {(twin.world, twin.strategy, twin.param_dtype) for twin in twins} == {(1, "none", None)}


@pytest.mark.parametrize("case", [c for c in STEPPED if c.inputs == "one-hot"], ids=lambda case: case.id)
def test_every_rank_is_hot_once(case):
    """A one-hot case has a step for each rank, since what a rank does wrong shows when it is hot."""
    assert {case.hot_rank(step) for step in range(case.steps)} == set(range(case.world))


@pytest.mark.parametrize("name", BUGS)
def test_mutants_have_cases(name):
    """The cases that a mutant is tried on exist, and belong to the implementation that it mutates."""
    matches = compile_expression(BUGS[name].keep)

    assert [case.id for case in QUICK if matches(case) and case.subject == BUGS[name].subject] != []


def test_every_bug_has_a_mutant():
    """A known bug has a mutant of its name, and a mutant a record."""
    families = Path(diagnosis.__file__).parents[1] / "implementations" / "mutants"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in families.glob("*.py")]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    of_torch = {name for name, node in classes.items() if any(ast.unparse(base) == "Mutant" for base in node.bases)}

    assert of_torch == {name for name, bug in BUGS.items() if bug.subject == "torch_impl"}


@pytest.mark.parametrize("signature", Signature, ids=lambda signature: signature.name)
def test_diagnosis_names_known_bugs_alone(signature):
    """What a failure is said to look like is a bug that the suite knows, and has seen itself find."""
    names = known_as(signature).partition(":")[0].split(", ")

    assert set(names) <= set(BUGS)


def test_readme_counts_the_bugs():
    """README says how many bugs `make mutants` puts in."""
    readme = Path(diagnosis.__file__).parents[2] / "README.md"

    assert f"{len(BUGS)} known bugs" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BUGS)
def test_flags_cite_clauses_that_exist(name):
    """A known bug violates clauses of SPEC.md."""
    assert BUGS[name].clauses
    assert set(BUGS[name].clauses) - set(CLAUSES) == set()
