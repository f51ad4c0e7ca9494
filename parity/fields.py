"""What the fields of an answer may hold: plain values of bounded size, whoever made them.

A record that an implementation gives is checked where it is made, in its rank, and again where it arrives. The
check goes by the annotation, so that a new field of a kind that is listed here needs no code of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import ml_dtypes
import numpy as np

from parity.printable import LONGEST, printable

DTYPES: dict[str, np.dtype] = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
    )
}
"""The numbers that a shard may hold, in this machine's order of bytes."""
_KNOWN = frozenset(DTYPES.values())
_DIMS = 32
_INT64 = range(-(2**63), 2**63)
_STEPS = range(2**31)

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value may stand there, and what is wanted, in words."""


def check_fields(record: Any, kind: type) -> None:
    """Refuse a record one of whose fields, as `kind` declares them, holds something else.

    Raises:
        TypeError: which field of which record, what is wanted, and what it holds.
    """
    for name, (allows, wanted) in _rules(kind):
        value = getattr(record, name)
        if not allows(value):
            raise TypeError(f"{_label(record)}{name} is {_shown(value)}, wanted {wanted}")


@functools.cache
def _rules(kind: type) -> tuple[tuple[str, Rule], ...]:
    """The rule of each field; an annotation without one is an error of whoever wrote the record."""
    return tuple((field.name, _RULES[str(field.type)]) for field in dataclasses.fields(kind))


def _label(record: Any) -> str:
    """`layers.0.lora_A gradient: `, where these are text."""
    words = [getattr(record, name, None) for name in ("name", "kind")]
    return printable(" ".join(word for word in words if type(word) is str), 200) + ": " if words[0] else ""


def _shown(value: Any) -> str:
    """An array by its class and dtype, text by its beginning, the rest by its class and its value."""
    if isinstance(value, np.ndarray):
        return printable(f"{type(value).__name__} of {value.dtype}", 100)
    if isinstance(value, str) and len(value) > LONGEST:
        return f"text of {len(value)} characters"
    return "None" if value is None else printable(f"{type(value).__name__} {str(value)[:100]!r}", 120)


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= LONGEST and value.isprintable()


def _is_number(value: Any, allowed: range = _INT64) -> bool:
    return isinstance(value, Integral) and type(value) is not bool and int(value) in allowed


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _DIMS and all(_is_number(n) and n >= 0 for n in value)


def _is_index(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _DIMS and all(map(_is_plain_slice, value))


def _is_plain_slice(part: Any) -> bool:
    return type(part) is slice and _is_number(part.start) and _is_number(part.stop) and part.step is None


_RULES: dict[str, Rule] = {
    "str": (_is_text, f"printable text of at most {LONGEST} characters"),
    "str | None": (lambda value: value is None or _is_text(value), f"None, or text of at most {LONGEST} characters"),
    "int": (lambda value: _is_number(value, _STEPS), "a whole number from 0 on"),
    "bool": (lambda value: type(value) is bool, "True or False"),
    "float": (lambda value: type(value) in {int, float} and math.isfinite(value), "a finite number"),
    "tuple[int, ...]": (_is_shape, f"a tuple of at most {_DIMS} sizes"),
    "tuple[str, ...]": (
        lambda value: type(value) is tuple and len(value) <= _DIMS and all(map(_is_text, value)),
        f"a tuple of at most {_DIMS} names",
    ),
    "Index": (_is_index, "slices with start, stop and no step"),
    "np.ndarray": (
        lambda value: type(value) is np.ndarray and value.dtype in _KNOWN,
        "a plain numpy array of bool, integers, float16 to float64 or bfloat16",
    ),
    "list[Shard]": (lambda value: type(value) is list, "a list"),
}
