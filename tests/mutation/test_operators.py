"""What is changed in a source text, and what is left alone."""

from pathlib import Path

import pytest
from operators import mutants_of

ROOT = Path(__file__).parent.parent.parent


def changes(source: str) -> set[tuple[str, str]]:
    """(before, after) of every mutant."""
    return {(mutant.before, mutant.after) for mutant in mutants_of("file.py", source.encode())}


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("x = a + b", ("a + b", "(a - b)")),
        ("x = a // b", ("a // b", "(a * b)")),
        ("x = -a", ("-a", "(a)")),
        ("x += 1", ("x += 1", "x -= 1")),
        ("x = a < b", ("a < b", "(a <= b)")),
        ("x = a < b", ("a < b", "(a >= b)")),
        ("x = a is None", ("a is None", "(a is not None)")),
        ("x = a and b", ("a and b", "(a or b)")),
        ("x = 3", ("3", "(4)")),
        ("x = 0.0", ("0.0", "(1.0)")),
        ("x = True", ("True", "False")),
        ("x = 'rows'", ("'rows'", "'rows_'")),
        ("x = a[1:n]", ("a[1:n]", "(a[:n])")),
        ("x[0] = a", ("x[0] = a", "pass")),
        ("x.add_(a)", ("x.add_(a)", "pass")),
        ("if a: raise ValueError", ("raise ValueError", "pass")),
        ("if a: b()", ("a", "(not (a))")),
        ("@no_grad()\ndef f(): b()", ("no_grad()", "(lambda function: function)")),
    ],
)
def test_a_change_is_made(source, change):
    """No mutant of this text makes that change."""
    made = changes(source)

    assert change in made


@pytest.mark.parametrize(
    "source",
    [
        '"""Two words."""',
        "def f(x: Literal[1] = None) -> tuple[int, 3]: return x",
        "warnings.warn('axis', 1)",
        "x = f(hint='axis')",
        "x = f'{a + 1}'",
        "Name = Callable[[int], 3]",
        "assert a < 3",
        "@dataclass(frozen=True)\nclass A: pass",
        "def __repr__(self): return 'a' + 'b'",
        "__all__ = ['a', 'b']",
        "from a import b\nimport c",
    ],
)
def test_what_no_test_should_judge_is_left_alone(source):
    """A message, a docstring, an annotation, an alias or an assertion is changed."""
    made = changes(source)

    assert not made


def test_a_mutant_differs_in_its_own_place_alone():
    """A change touches other bytes than those it names, where letters of two bytes stand before it."""
    source = "é = 'ü' ; x = a + b  # ö\n".encode()

    (mutant,) = (mutant for mutant in mutants_of("file.py", source) if mutant.kind == "arithmetic")

    assert mutant.apply(source) == "é = 'ü' ; x = (a - b)  # ö\n".encode()


@pytest.mark.parametrize("file", ["torch_impl/layers/norm.py", "ref/dora.py", "torch_impl/sharding/apply.py"])
def test_keys_are_unique(file):
    """Two mutants of a file have one key, so that listing one as equivalent lists the other."""
    mutants = mutants_of(file, (ROOT / file).read_bytes())

    assert len({mutant.key for mutant in mutants}) == len(mutants)
