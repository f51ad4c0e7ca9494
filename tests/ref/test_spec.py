"""SPEC.md keeps its promises: every clause is whole, names functions that exist, and has a test that names it."""

import ast
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOM = Path(importlib.import_module("ref").__file__).parent
SPECIFIED = [
    *(["D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "D9", "D10", "D11", "D12", "D13", "D16", "G1", "G2"]),
    *(["Q1", "Q2", "Q3", "Q4", "Q5", "Q6", "Q7", "Q8"]),
    *(["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11", "S12"]),
    *(["T1", "T2", "T3", "T4", "T5", "T6", "C1", "C2", "C3", "C4"]),
]
LINES = ["Equation", "Reason", "Differs", "Function", "Cases"]
HEADING = re.compile(r"^### (?P<clause>[CDGQST]\d+) [A-Z].*$")


def clauses() -> dict[str, str]:
    """The text under each heading of the third level, by the heading's first word."""
    text, _, _ = (ROOM / "SPEC.md").read_text(encoding="utf-8").partition("\n## Later")
    parts = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    return {part.split()[0]: re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts}


PEERS = r"(?:peft|torchtune|torchao|mlx-lm|mlx|bitsandbytes|optax|torch|transformers|NVlabs|fsdp_qlora)"
RUN = re.compile(rf"(?<![\w-])({PEERS})(?:'s|/DoRA at| at)? (\d+(?:\.\d+)+|[0-9a-f]{{7}})(?!\w)")
"""A name with the version that was run."""
NOBODY = "none found among peft {peft}, torchtune {torchtune}, torchao {torchao}, mlx {mlx}"


def preamble() -> str:
    """The text before the first heading of the second level."""
    return " ".join((ROOM / "SPEC.md").read_text(encoding="utf-8").partition("\n## ")[0].split())


CLAUSES = clauses()
VERSIONS = dict(RUN.findall(preamble().partition("Under `Differs`")[2]))
EACH = pytest.mark.parametrize("clause", SPECIFIED)


def functions(clause: str) -> list[str]:
    """The import paths on a clause's `Function:` line."""
    (line,) = re.findall(r"^Function: (.*)$", CLAUSES[clause], flags=re.MULTILINE)
    return re.findall(r"`([\w.]+)`", line)


def resolve(path: str) -> object:
    """What an import path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_clauses_are_those_that_are_specified() -> None:
    """No clause is missing, doubled, or there without being promised."""
    headings = re.findall(r"^### (\S+)", (ROOM / "SPEC.md").read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert headings == SPECIFIED


@EACH
def test_headings_are_well_formed(clause: str) -> None:
    """A heading is an identifier and a name."""
    heading = "### " + CLAUSES[clause].splitlines()[0]

    assert HEADING.match(heading)


@EACH
def test_clauses_are_whole(clause: str) -> None:
    """A clause has a statement, then its five lines, each once and in this order."""
    labels = re.findall(r"^([A-Z][a-z]+): ", CLAUSES[clause], flags=re.MULTILINE)
    statement = CLAUSES[clause].partition("\nEquation:")[0].splitlines()[1:]

    assert labels == LINES
    assert any(statement)


@EACH
def test_differs_says_who_was_run(clause: str) -> None:
    """Who differs is named with the version that was run, or nobody was found among those who were."""
    text = " ".join(
        re.findall(r"^Differs: (.*?)^Function: ", CLAUSES[clause], flags=re.MULTILINE | re.DOTALL)[0].split()
    )
    named = RUN.findall(text)

    assert named
    assert all(VERSIONS[name] == version for name, version in named)
    assert "none found" not in text or text.startswith(NOBODY.format(**VERSIONS))


@pytest.mark.parametrize("name", ["peft", "bitsandbytes", "optax", "torch", "transformers"])
def test_versions_that_were_run_are_those_installed(name: str) -> None:
    """What is said of a peer is said of the one that the tests run: a new one is run before its number is written."""
    assert VERSIONS[name] == importlib.metadata.version(name).partition("+")[0]


@EACH
def test_functions_exist(clause: str) -> None:
    """Every function that a clause names can be imported and called."""
    named = functions(clause)

    assert named
    assert all(callable(resolve(path)) for path in named)


@EACH
def test_functions_cite_their_clause(clause: str) -> None:
    """At least one function that a clause names says so in its docstring."""
    documented = [resolve(path).__doc__ or "" for path in functions(clause)]

    assert any(re.search(rf"\b{clause}\b", text) for text in documented)


@EACH
def test_cases_are_those_that_declare_the_clause(clause: str) -> None:
    """The suite finds a clause's cases by the clause itself; where none can show it, this folder's tests do."""
    (line,) = re.findall(r"^Cases: (.*)$", CLAUSES[clause], flags=re.MULTILINE)

    assert line in (f"`clause:{clause}`", "`tests/ref`")


@EACH
def test_clauses_have_a_test(clause: str) -> None:
    """At least one test of this folder carries the clause in its name."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    names = [node.name for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]

    assert any(name.startswith(f"test_{clause.lower()}_") for name in names)
