"""Short digests of code and cases: whether something is still what it was, under any version of Python.

Comments, docstrings and empty lines do not count.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import io
import re
import tokenize
from functools import cache
from pathlib import Path

from parity.case import Case

ROOM = Path(__file__).parents[1]
_JUDGE = ("case*.py", "shard.py", "case/*.py", "checks/*.py", "oracle/*.py", "bounds/*.py", "inputs/*.py")
"""What decides on a case's outcome, below this package."""
_LENGTH = 16


@cache
def judge_digest() -> str:
    """Of all code that makes inputs and expectations, and compares."""
    files = sorted({path for pattern in _JUDGE for path in ROOM.glob(pattern)})
    return _short("".join(f"{path.relative_to(ROOM)} {_said(path)}" for path in files))


def case_digest(case: Case) -> str:
    """Of all that it declares, but the number that the draws begin with."""
    declared = {field.name: getattr(case, field.name) for field in dataclasses.fields(case) if field.name != "seed"}
    return _short(f"{type(case).__name__} {sorted(declared.items())}")


@cache
def mutant_digests() -> dict[str, str]:
    """Of each class of a mutant, with what all of `torch_impl`'s share."""
    folder = ROOM / "implementations" / "mutants"
    shared = _said(folder / "base.py")
    files = [*sorted(folder.glob("*.py")), folder.with_name("jax_mutants.py")]
    classes = [(path, node) for path in files for node in _tree(path).body if isinstance(node, ast.ClassDef)]
    return {node.name: _short(shared + _said(path, node)) for path, node in classes}


@cache
def function_digests() -> dict[str, str]:
    """Of each function of the specification that a clause names, by its import path."""
    named = {path for paths in named_functions().values() for path in paths}
    return {path: digest for path in sorted(named) if (digest := _function_digest(path))}


@cache
def named_functions() -> dict[str, tuple[str, ...]]:
    """The functions that SPEC.md's clauses name, by clause."""
    text = (_reference() / "SPEC.md").read_text(encoding="utf-8")
    named: dict[str, tuple[str, ...]] = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        found = re.search(r"^Function: (.*?)^Cases:", part, flags=re.MULTILINE | re.DOTALL)
        if found:
            named[part.split()[0]] = tuple(re.findall(r"`([\w.]+)`", found[1]))
    return named


def _function_digest(path: str) -> str:
    """Of the definition alone; empty where there is none in the file that the path names."""
    module, _, name = path.removeprefix("ref.").rpartition(".")
    file = _reference().joinpath(*module.split(".")).with_suffix(".py")
    for node in _tree(file).body if file.exists() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return _short(_said(file, node))
    return ""


@cache
def _reference() -> Path:
    """Where the specification lies; found without loading it."""
    spec = importlib.util.find_spec("ref")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("ref")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _said(path: Path, node: ast.FunctionDef | ast.ClassDef | None = None) -> str:
    """The code of a definition with its decorators, or of the whole file."""
    lines = _code_lines(path)
    if node is not None:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        lines = lines[first - 1 : node.end_lineno]
    return "\n".join(filter(None, lines))


@cache
def _code_lines(path: Path) -> tuple[str, ...]:
    """A file's lines, empty where there is no code. Not by `ast.dump`, which each version of Python does otherwise."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for text_node in _texts(_tree(path)):
        first, last = text_node.lineno - 1, text_node.end_lineno or text_node.lineno
        lines[first:last] = [""] * (last - first)
    return tuple(line.rstrip() for line in lines)


def _texts(tree: ast.Module) -> list[ast.Expr]:
    """Docstrings, of fields and constants too; each has its lines to itself."""
    bodies = (getattr(node, "body", None) for node in ast.walk(tree))
    return [part for body in bodies if isinstance(body, list) for part in body if _is_text(part)]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]
