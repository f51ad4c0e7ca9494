"""`-k EXPR`: which cases are meant. Words match a part of the identifier, a whole clause, or a link."""

from __future__ import annotations

import re
from collections.abc import Callable

from parity.case import Case
from parity.errors import BadExpression

Predicate = Callable[[Case], bool]
_TOKEN = re.compile(r"\s*(\(|\)|[^\s()]+)")


def compile_expression(text: str) -> Predicate:
    """Turn `fsdp2 and not (nf4 or w3)` into a predicate on cases.

    Raises:
        BadExpression: a word or a parenthesis is missing or in the wrong place.
    """
    tokens = _TOKEN.findall(text)
    if not tokens:
        raise BadExpression(f"-k {text!r} is empty", hint="give a word, as in: -k 'fsdp2 and nf4'")
    predicate, rest = _either(tokens, text)
    if rest:
        raise BadExpression(f"-k {text!r}: {rest[0]!r} is out of place", hint="join words by and, or, not, ( )")
    return predicate


def _either(tokens: list[str], text: str) -> tuple[Predicate, list[str]]:
    left, tokens = _both(tokens, text)
    while tokens and tokens[0] == "or":
        right, tokens = _both(tokens[1:], text)
        left = _any_of(left, right)
    return left, tokens


def _both(tokens: list[str], text: str) -> tuple[Predicate, list[str]]:
    left, tokens = _single(tokens, text)
    while tokens and tokens[0] == "and":
        right, tokens = _single(tokens[1:], text)
        left = _all_of(left, right)
    return left, tokens


def _single(tokens: list[str], text: str) -> tuple[Predicate, list[str]]:
    if not tokens or tokens[0] in {"and", "or", ")"}:
        raise BadExpression(f"-k {text!r}: a word is missing", hint="join words by and, or, not, ( )")
    if tokens[0] == "not":
        inner, tokens = _single(tokens[1:], text)
        return (lambda case: not inner(case)), tokens
    if tokens[0] == "(":
        inner, tokens = _either(tokens[1:], text)
        if not tokens or tokens[0] != ")":
            raise BadExpression(f"-k {text!r}: a parenthesis is not closed", hint="add )")
        return inner, tokens[1:]
    return _word(tokens[0]), tokens[1:]


def _word(word: str) -> Predicate:
    return lambda case: word in case.clauses or word in case.id or word == case.link


def _any_of(left: Predicate, right: Predicate) -> Predicate:
    return lambda case: left(case) or right(case)


def _all_of(left: Predicate, right: Predicate) -> Predicate:
    return lambda case: left(case) and right(case)
