"""The last part of an identifier: what departs from the plain case, in the same order for every kind."""

from __future__ import annotations

import dataclasses
from typing import Any

_DRAWN = ("rank_stabilized", "flat", "bias", "zero_rows", "hard_rows", "ties", "zero_b", "batched", "faint")
_STEPPED = ("late", "recompute", "keep_gathered", "counted", "compiled")
_VALUES = {
    "activation": "",
    "dropout": "dropout-",
    "tokens": "tokens-",
    "method": "method-",
    "experts": "experts-",
    "blocksize": "blocks-of-",
    "replicas": "replicas-",
    "tensor": "tensor-",
    "storage": "storage-",
    "param_dtype": "wire-",
    "reduce_dtype": "reduce-",
    "units": "units-",
    "optimizer": "by-",
    "accumulate": "accumulate-",
    "clip": "clip-",
    "resume": "resume-",
}
"""Fields whose value is shown, each behind these words."""


def departures(case: Any) -> list[str]:
    """The names of what is so, then the values that are not the plain ones; of a kind's own fields alone."""
    plain = {field.name: field.default for field in dataclasses.fields(case)}
    named = [name for name in (*_DRAWN, *_STEPPED) if getattr(case, name, False)]
    return named + [
        f"{words}{_shown(getattr(case, name))}"
        for name, words in _VALUES.items()
        if name in plain and _departs(case, name, plain[name])
    ]


def _departs(case: Any, name: str, plain: Any) -> bool:
    """The number of tokens is shown where some rank has none."""
    return case.tokens < case.input_world if name == "tokens" else getattr(case, name) != plain


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
