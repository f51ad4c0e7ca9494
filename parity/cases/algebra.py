"""Link 1: autodiff, closed form, differences of the norm-frozen surrogate, and peft as the outside witness."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from parity.case import Case, TrainCase
from parity.cases.shapes import THIN, UNEVEN

_SUBJECTS = {
    "closed-form": ("D1", "D2", "D3", "D5", "G1"),
    "differences": ("D5", "G2"),
    "peft": ("D1", "D2", "D3", "D5", "D8"),
}


def algebra_cases() -> list[Case]:
    """One layer in float64, with and without a bias and B = 0."""
    return list(_declare())


def _declare() -> Iterator[Case]:
    features = ({}, {"zero_b": True}, {"bias": True})
    for subject, shape, feature in product(_SUBJECTS, (UNEVEN, THIN), features):
        if "bias" in feature and subject != "peft":
            continue  # a bias changes no gradient, and the two JAX routes leave it out
        yield TrainCase(
            link="algebra",
            inputs="gaussian",
            subject=subject,
            layers=shape.layers[1:],
            shape_name=f"{shape.name}-last",
            rank=shape.rank,
            alpha=shape.scaling * shape.rank,
            base="float64",
            compute="float64",
            clauses=_SUBJECTS[subject],
            **feature,
        )
