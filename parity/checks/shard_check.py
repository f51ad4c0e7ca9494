"""A check compares one shard with the slice of the expectation, and proves that it could have failed.

Modes, strongest first: `bitwise` (equal values; the sign of zero is ignored for gradients and what follows from
them), `bits` (every bit), `ulp` (units in the last place of the wanted float32), `bound` (an array of limits), `norm`
(one limit for the 2-norm of the difference).

A check *detects* a scale e where it fails for the tensor times 1 + e: the smallest one is derived from its limits. It
is *vacuous* where a fault that changes this shard would have passed: the tensor zeroed, doubled, negated or off by the
case's coarsest scale, or the numerically nearest mutant's values. No tolerance is written here: limits come with the
expectation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import ml_dtypes
import numpy as np

from parity.shard import Shard

Mode = Literal["bitwise", "bits", "ulp", "bound", "norm"]
Against = Literal["oracle", "twin", "itself", "declared", "layout", "refusal", "mutant", "whole"]
"""What the expectation rests on: the reference in float64; the same implementation unsharded; the same tensor before;
what the case declares; the reference's index arithmetic; the words of a refusal; a mutant that must fail; the ranks'
shards put together."""
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
    against: Against = "oracle"
    """What `value` rests on."""
    clauses: tuple[str, ...] = ()
    """The clauses of SPEC.md that the comparison bears on."""
    dtype: str = ""
    """The dtype that every shard must have on its device (D11), by numpy's name; empty where none is prescribed."""
    coarsest: float = 1.0
    """The uniform relative error that must be seen, or the check counts as vacuous."""
    repeats: str = ""
    """What other check says the same, or empty; it is then not counted a second time."""


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
    mode: Mode | Literal[""]
    """How it was compared; empty where there was nothing to compare: `fault` then says why."""
    worst: float
    """The largest difference (in `norm` mode the difference's norm)."""
    limit: float
    """The limit at that element; 0 for equality."""
    ratio: float | None
    """worst / limit; 0 where equal, None where equality fails."""
    passed: bool
    fault: str = ""
    """What is wrong beside the values: the place, the dtype, a missing part; or empty."""
    against: Against = "oracle"
    """What the expectation rests on."""
    clauses: tuple[str, ...] = ()
    """The clauses that this check bears on."""
    detects: float | None = None
    """The smallest uniform relative error that would have failed here; None where there is no such number."""
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
        return _misplaced(shard, expected, str(error))
    got = shard.array
    if got.shape != want.shape or tuple(shard.global_shape) != expected.value.shape:
        said = f"shape {got.shape} of {shard.global_shape}, wanted {want.shape} of {expected.value.shape}"
        return _misplaced(shard, expected, said)
    limit = _limit_slice(shard, expected) if not expected.no_claim else np.full(want.shape, np.inf)
    mode = "bound" if expected.no_claim else expected.mode
    result = _compare(got, want, mode, limit)
    fault = _dtype_fault(got, expected)
    passed = result.passed and not fault
    evidence = None
    if not result.passed and want.size:
        evidence = Evidence(at=result.at, got=float(got[result.at]), want=float(want[result.at]))
    return Check(
        **_identity(shard, expected),
        mode=expected.mode,
        worst=result.worst,
        limit=result.limit,
        ratio=result.ratio,
        passed=passed,
        fault=fault,
        detects=_detects(got, want, mode, limit),
        vacuous=_vacuous(shard, expected, want, limit),
        evidence=evidence,
        got=None if passed else got,
        want=None if passed else want,
    )


def failure(key: tuple[int, str, str], rank: int, fault: str, **about: object) -> Check:
    """A check that failed before any values could be compared; `about` are further fields."""
    step, kind, name = key
    given = {"index": (), "worst": float("inf"), "against": "whole", **about}
    return Check(
        tensor=name, kind=kind, step=step, rank=rank, mode="", limit=0.0, ratio=None, passed=False, fault=fault, **given
    )


def _identity(shard: Shard, expected: Expected) -> dict:
    return {
        "tensor": shard.name,
        "kind": shard.kind,
        "step": shard.step,
        "rank": shard.rank,
        "index": shard.index,
        "against": expected.against,
        "clauses": expected.clauses,
    }


def _misplaced(shard: Shard, expected: Expected, why: str) -> Check:
    about = {"index": shard.index, "against": expected.against, "clauses": expected.clauses}
    return failure(shard.key, shard.rank, f"place: {why}", **about)


def _dtype_fault(got: np.ndarray, expected: Expected) -> str:
    """D11: equal values in a narrower dtype are another tensor; a step later they would round."""
    if expected.dtype and got.dtype.name != expected.dtype:
        return f"dtype {got.dtype.name}, wanted {expected.dtype}"
    return ""


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


def _detects(got: np.ndarray, want: np.ndarray, mode: Mode, limit: np.ndarray | float | None) -> float | None:
    """The smallest e for which `(1 + e) want` fails: every element moves by e of itself, so one beyond its limit does.

    Where values must be equal it is the spacing of the dtype that they came in, relative to the number: the least that
    rounding leaves visible in every element.
    """
    if mode == "bits" or not want.size or not want.astype(np.float64).any():
        return None
    if mode == "bitwise":
        return float(ml_dtypes.finfo(got.dtype).eps) if got.dtype.kind in "fV" else None
    value = np.abs(want.astype(np.float64))
    if mode == "norm":
        return float(limit) / float(np.linalg.norm(value))  # type: ignore[arg-type]
    if mode == "ulp":
        return float(limit) * float(np.finfo(np.float32).eps)  # type: ignore[arg-type]
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(value > 0, np.broadcast_to(np.asarray(limit), value.shape) / value, np.inf)
    return float(scales.min())


def _vacuous(shard: Shard, expected: Expected, want: np.ndarray, limit: np.ndarray | float | None) -> str:
    """Why the check shows nothing, in words, or empty."""
    if want.size == 0:
        return "empty shard"
    if expected.repeats:
        return f"repeats {expected.repeats}"
    if expected.no_claim:
        return f"no claim: {expected.no_claim}"
    if expected.mode == "bits" or expected.against == "declared":
        return ""  # any changed bit is seen; the zeroed tensor is among the faults only where it differs
    return _unseen_fault(shard, expected, want, limit)


def _unseen_fault(shard: Shard, expected: Expected, want: np.ndarray, limit: np.ndarray | float | None) -> str:
    """The first fault that would have passed here, in words, or empty."""
    value = want.astype(np.float64)
    norm = float(np.linalg.norm(value))
    if not norm:
        return "all-zero expectation"
    faults = {"zeroed": 0 * value, "doubled": 2 * value, "negated": -value}
    faults |= {name: shard.part_of(array).astype(np.float64) for name, array in expected.mutants.items()}
    for name, fault in faults.items():
        detectable = float(np.linalg.norm(fault - value)) > _SAME * norm
        if detectable and _compare(fault, value, expected.mode, limit).passed:
            return f"{name} would pass"
    if expected.mode == "bitwise":
        return ""  # there is no finer comparison
    detects = _detects(shard.array, want, expected.mode, limit)
    return f"an error of {expected.coarsest:g} would pass" if detects and detects > expected.coarsest else ""
