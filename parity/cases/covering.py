"""What a trainer may combine, two by two: covering arrays over the ways to store, shard, feed and step.

A case for every combination would be a hundred thousand; a bug of an interaction nearly always shows with two of its
factors set (Kuhn, Wallace and Gallo, 2004). `allpairspy` chooses rows so that each pair of values that can stand
together stands together in one of them; what cannot is listed, with the reason, by `dora-parity list --matrix`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from allpairspy import AllPairs

from parity.case import UNSHARDED, Case
from parity.cases.declared import stack_case
from parity.cases.shapes import UNEVEN

Row = dict[str, Any]
"""A value for each factor."""
_TOKENS = 32
"""A power of two, so that the mean over tokens is exact."""


@dataclass(frozen=True)
class Rule:
    """Two factors that cannot stand together."""

    broken: Callable[[Row], bool]
    """Whether a row, of which some factors may be missing, breaks it."""
    reason: str


@dataclass(frozen=True)
class Array:
    """A family of cases: its factors, and what cannot be combined."""

    name: str
    factors: OrderedDict[str, list[Any]]
    rules: tuple[Rule, ...]

    def rows(self) -> list[Row]:
        """Rows in which every possible pair of values stands; those that the library's greedy choice missed, behind."""
        names = list(self.factors)
        pairs = AllPairs(self.factors, filter_func=lambda row: not self.why_not(dict(zip(names, row, strict=False))))
        rows = [row._asdict() for row in pairs]
        for pair in self._pairs():
            row = None if any(pair <= row.items() for row in rows) else self._completed(dict(pair))
            rows += [row] if row else []
        return rows

    def _pairs(self) -> Iterator[set[tuple[str, Any]]]:
        for (one, ones), (other, others) in itertools.combinations(self.factors.items(), 2):
            yield from ({(one, a), (other, b)} for a, b in itertools.product(ones, others))

    def _completed(self, pair: Row) -> Row | None:
        """A row that holds this pair and breaks no rule, plain in all else; None where there is none."""
        choices = [[pair[name]] if name in pair else values for name, values in self.factors.items()]
        for values in itertools.product(*choices):
            row = dict(zip(self.factors, values, strict=True))
            if not self.why_not(row):
                return row
        return None

    def why_not(self, row: Row) -> str:
        """The first rule that a row breaks, in words, or empty."""
        return next((rule.reason for rule in self.rules if rule.broken(row)), "")

    def holes(self) -> Iterator[tuple[str, str, str]]:
        """The pairs of values that stand in no row, each with its reason."""
        rows = self.rows()
        for pair in self._pairs():
            if not any(pair <= row.items() for row in rows):
                (one, a), (other, b) = sorted(pair)
                reason = self.why_not(dict(pair)) or "every row that holds both breaks a rule with a third factor"
                yield f"{one}={_shown(a)}", f"{other}={_shown(b)}", reason


def _shown(value: Any) -> str:
    """A value in words."""
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _has(row: Row, name: str, *values: Any) -> bool:
    return name in row and row[name] in values


_STORED = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("nf4", "float32"),
    ("nf4", "bfloat16"),
    ("fp4", "float32"),
]
_PLACES = [("fsdp1", 2), ("fsdp1-orig", 3), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("fsdp1-hybrid", 4), ("ddp", 2)]

_LATE = Rule(
    lambda row: _has(row, "late", True) and _has(row, "accumulate", 1), "one forward a step leaves nothing to defer"
)

SHARDED = Array(
    "sharded runs against the same run unsharded, one rank hot",
    OrderedDict(
        stored=_STORED,
        place=_PLACES,
        optimizer=["sgd", "adamw"],
        accumulate=[1, 2, 3, 4],
        late=[False, True],
        recompute=[False, True],
        resume=["", "same", "other"],
        dropout=[0.0, 0.1, 0.25],
        method=["dora", "lora"],
        wire=[None, "bfloat16"],
        bias=[False, True],
        keep_gathered=[False, True],
    ),
    (
        _LATE,
        Rule(
            lambda row: _has(row, "accumulate", 2, 3, 4) and "place" in row and row["place"][1] == 3,  # noqa: PLR2004
            "a sum of thirds is not the third of a sum: bitwise at powers of two alone",
        ),
        Rule(
            lambda row: (
                _has(row, "accumulate", 2, 3, 4)
                and _has(row, "late", False)
                and "place" in row
                and row["place"][0] == "ddp"
            ),
            "DDP averages what it has averaged before together with each new gradient: bitwise where deferred alone",
        ),
        Rule(
            lambda row: _has(row, "wire", "bfloat16") and "stored" in row and row["stored"] != ("bfloat16", "bfloat16"),
            "a wire in bfloat16 would change the weight that the forward uses (D6, S6): refused",
        ),
        Rule(
            lambda row: _has(row, "keep_gathered", True) and "place" in row and row["place"][0] == "ddp",
            "DDP gathers nothing",
        ),
    ),
)
"""Clipping is not among them: its norm is a sum over all shards, whose order is the strategy's (S5)."""

BOUNDED = Array(
    "runs against the reference within its bounds",
    OrderedDict(
        stored=[("float32", "float32"), ("bfloat16", "float32"), ("nf4", "float32"), ("fp4", "float32")],
        place=[(UNSHARDED, 1), *_PLACES],
        optimizer=["sgd", "adamw"],
        clip=[0.0, 0.5],
        accumulate=[1, 2, 3, 4],
        late=[False, True],
        dropout=[0.0, 0.1, 0.25],
        method=["dora", "lora"],
        features=["", "bias", "zero_rows", "rank_stabilized", "relu"],
    ),
    (_LATE,),
)

ARRAYS = (SHARDED, BOUNDED)


def covering_cases() -> list[Case]:
    """A case for each row of each array."""
    return [*map(_sharded, SHARDED.rows()), *map(_bounded, BOUNDED.rows())]


def _common(row: Row) -> dict[str, Any]:
    (base, compute), (strategy, world) = row["stored"], row["place"]
    passed = ("optimizer", "accumulate", "late", "dropout", "method")
    at = {"base": base, "compute": compute, "strategy": strategy, "world": world, "tokens": _TOKENS}
    return {"link": "training", **at, **{name: row[name] for name in passed}}


def _sharded(row: Row) -> Case:
    strategy, world = row["place"]
    other = "fsdp1" if strategy == "fsdp2" else "fsdp2"
    resume = {"": "", "same": strategy, "other": other}[row["resume"]]
    wire = {"param_dtype": row["wire"], "reduce_dtype": row["wire"]} if row["wire"] else {}
    kept = {name: row[name] for name in ("recompute", "bias", "keep_gathered")}
    return stack_case(UNEVEN, inputs="one-hot", steps=max(2, world), resume=resume, **wire, **kept, **_common(row))


def _bounded(row: Row) -> Case:
    feature = row["features"]
    features = {"activation": "relu"} if feature == "relu" else {feature: True} if feature else {}
    # a ReLU whose input lies near 0 may flip, and every later step inherits that
    steps = 1 if feature == "relu" else 2
    return stack_case(UNEVEN, inputs="gaussian", steps=steps, clip=row["clip"], **features, **_common(row))
