"""What the oracle says of one tensor, before the pipeline knows what it will be compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from parity.case import TrainCase
from parity.shard import Index

Key = tuple[int, str, str]
"""(step, kind, tensor name)."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The float64 value and the limits derived for it."""

    value: np.ndarray
    limit: np.ndarray | float | None = None
    """For one computation against the oracle: an array (per element), a number (on the 2-norm), or None."""
    pair_limit: np.ndarray | None = None
    """For two computations against each other, each with its own roundings."""
    mutants: dict[str, np.ndarray] = field(default_factory=dict)
    """The same tensor as the numerically nearest bugs would give it."""
    no_claim: str = ""
    """Why nothing can be claimed of this tensor, or empty."""


Predictions = dict[Key, Prediction]


@dataclass(frozen=True)
class LayoutQuestion:
    """Where should the parameters of this case lie, by the reference's own units and order (S1, S2, S7)?"""

    case: TrainCase


Layouts = dict[tuple[str, int], Index]
"""(name, rank) to the part that the rank holds."""
