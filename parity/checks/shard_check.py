"""A check compares one shard with the slice of the expectation, and proves that it could have failed.

Modes, strongest first: `bitwise` (equal values; the sign of zero is ignored for gradients and what follows from
them), `bits` (every bit), `ulp` (units in the last place of the wanted float32), `bound` (an array of limits), `norm`
(one limit for the 2-norm of the difference).
A check is *vacuous* where a fault that changes this shard would have passed: the tensor zeroed, doubled or
negated, or the numerically nearest mutant's values. No tolerance is written here: limits come with the expectation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from parity.shard import Shard

Mode = Literal["bitwise", "bits", "ulp", "bound", "norm"]
_SAME = 1e-12
"""A mutant that differs from the right values by less than this share of their norm, float64 rounding, is no fault."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One unsharded tensor as it ought to be."""

    value: np.ndarray
    mode: Mode
    limit: np.ndarray | float | None = None
    """An array of the value's shape for `bound`, a number for `norm` and `ulp`, None where values must be equal."""
    mutants: dict[str, np.ndarray] = field(default_factory=dict)
    """What the nearest bugs would have given."""
    no_claim: str = ""
    """Why nothing can be claimed of this tensor, or empty: the check is then vacuous."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The worst element: what came, what was wanted."""

    at: tuple[int, ...]
    got: float
    want: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """The verdict on one shard."""

    tensor: str
    kind: str
    step: int
    rank: int
    index: tuple[slice, ...]
    mode: str
    worst: float
    """The largest difference (in `norm` mode the difference's norm)."""
    limit: float
    """The limit at that element; 0 for equality."""
    ratio: float | None
    """worst / limit; 0 where equal, None where equality fails."""
    passed: bool
    vacuous: str = ""
    """Why the check shows nothing, or empty."""
    evidence: Evidence | None = None
    got: np.ndarray | None = None
    """Kept only where the check failed, for the diagnosis; never written."""
    want: np.ndarray | None = None


@dataclass(frozen=True)
class _Comparison:
    passed: bool
    worst: float
    limit: float
    ratio: float | None
    at: tuple[int, ...]


def check_shard(shard: Shard, expected: Expected) -> Check:
    """Compare, and try the faults. An index that does not fit is a failure, not an error."""
    try:
        want = shard.part_of(expected.value)
    except IndexError as error:
        return _misplaced(shard, str(error))
    got = shard.array
    if got.shape != want.shape or tuple(shard.global_shape) != expected.value.shape:
        return _misplaced(
            shard, f"shape {got.shape} of {shard.global_shape}, wanted {want.shape} of {expected.value.shape}"
        )
    limit = _limit_slice(shard, expected) if not expected.no_claim else np.full(want.shape, np.inf)
    mode = "bound" if expected.no_claim else expected.mode
    result = _compare(got, want, mode, limit)
    evidence = None
    if not result.passed and want.size:
        evidence = Evidence(at=result.at, got=float(got[result.at]), want=float(want[result.at]))
    return Check(
        **_identity(shard),
        mode=expected.mode,
        worst=result.worst,
        limit=result.limit,
        ratio=result.ratio,
        passed=result.passed,
        vacuous=_vacuous(shard, expected, want, limit),
        evidence=evidence,
        got=None if result.passed else got,
        want=None if result.passed else want,
    )


def _identity(shard: Shard) -> dict:
    return {
        "tensor": shard.name,
        "kind": shard.kind,
        "step": shard.step,
        "rank": shard.rank,
        "index": shard.index,
    }


def _misplaced(shard: Shard, why: str) -> Check:
    return Check(**_identity(shard), mode=f"place: {why}", worst=float("inf"), limit=0.0, ratio=None, passed=False)


def _limit_slice(shard: Shard, expected: Expected) -> np.ndarray | float | None:
    limit = expected.limit
    return shard.part_of(limit) if isinstance(limit, np.ndarray) else limit


def _compare(got: np.ndarray, want: np.ndarray, mode: Mode, limit: np.ndarray | float | None) -> _Comparison:
    """One comparison in one mode; an empty shard always agrees."""
    if want.size == 0:
        return _Comparison(passed=True, worst=0.0, limit=0.0, ratio=0.0, at=())
    if mode == "norm":
        return _compare_norm(got, want, float(limit))  # type: ignore[arg-type]
    with np.errstate(invalid="ignore"):  # packed bytes seen as bfloat16 may be infinite or no number at all
        error = np.asarray(np.abs(got.astype(np.float64) - want.astype(np.float64)))
    if mode == "ulp":
        return _compare_bound(error, float(limit) * np.spacing(np.abs(want).astype(np.float32)).astype(np.float64))
    if mode == "bound":
        return _compare_bound(error, np.asarray(limit))
    differs = np.asarray(_bits(got) != _bits(want) if mode == "bits" else ~(got == want))
    at = _argmax(np.where(differs, np.where(np.isfinite(error), error, np.inf), -1.0))
    passed = not bool(differs.any())
    return _Comparison(passed=passed, worst=float(error[at]), limit=0.0, ratio=0.0 if passed else None, at=at)


def _compare_norm(got: np.ndarray, want: np.ndarray, limit: float) -> _Comparison:
    error = got.astype(np.float64) - want.astype(np.float64)
    worst = float(np.linalg.norm(error))
    passed = bool(worst <= limit and np.isfinite(worst))
    return _Comparison(passed=passed, worst=worst, limit=limit, ratio=_ratio(worst, limit), at=_argmax(np.abs(error)))


def _compare_bound(error: np.ndarray, limit: np.ndarray) -> _Comparison:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error == 0, 0.0, error / limit)
    at = _argmax(np.where(np.isnan(ratios), np.inf, ratios))
    worst, allowed = float(error[at]), float(limit[at])
    passed = bool(((error <= limit) & np.isfinite(error)).all())
    return _Comparison(passed=passed, worst=worst, limit=allowed, ratio=_ratio(worst, allowed), at=at)


def _ratio(worst: float, limit: float) -> float | None:
    if worst == 0:
        return 0.0
    ratio = worst / limit if limit > 0 else np.inf
    return ratio if np.isfinite(ratio) else None


def _argmax(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(values)), values.shape)) if values.ndim else ()


def _bits(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, order="C").view(f"u{array.dtype.itemsize}")


def _vacuous(shard: Shard, expected: Expected, want: np.ndarray, limit: np.ndarray | float | None) -> str:
    """The first fault that would have passed here, in words, or empty."""
    if want.size == 0:
        return "empty shard"
    if expected.no_claim:
        return f"no claim: {expected.no_claim}"
    if expected.mode == "bits":
        return ""  # any changed bit is seen; the zeroed tensor is among the faults only where it differs
    if not want.astype(np.float64).any():
        return "all-zero expectation"
    value = want.astype(np.float64)
    faults = {"zeroed": 0 * value, "doubled": 2 * value, "negated": -value}
    faults |= {name: shard.part_of(array).astype(np.float64) for name, array in expected.mutants.items()}
    norm = float(np.linalg.norm(value))
    for name, fault in faults.items():
        detectable = float(np.linalg.norm(fault - value)) > _SAME * norm
        if detectable and _compare(fault, value, expected.mode, limit).passed:
            return f"{name} would pass"
    return ""
