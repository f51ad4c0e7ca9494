"""Which known bug a failure looks like: what the wrong shards have in common, in numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from parity.bugs.known import known_as
from parity.bugs.record import Signature
from parity.checks.shard_check import Check
from parity.report.results import CaseResult

_CLOSE = 1e-3
"""How near a ratio must be to its bug's factor to be named; a hint to the reader, never a verdict."""


def diagnose(result: CaseResult) -> CaseResult:
    """The same result, with the known bug that its failures resemble, if any."""
    failed = [check for check in result.checks if not check.passed]
    if not failed:
        return result
    first = min(check.step for check in failed)  # what is wrong later follows from it
    failed = [check for check in failed if check.step == first]
    return dataclasses.replace(result, looks_like=_resemblance(result, failed))


def _resemblance(result: CaseResult, failed: list[Check]) -> str:
    signature = _signature(result, failed)
    return known_as(signature) if signature else ""


def _signature(result: CaseResult, failed: list[Check]) -> Signature | None:
    """The first that fits: by place, by factor, by which tensors are wrong."""
    world, copies = result.case.world, result.case.copies
    factors = _factors([check for check in failed if check.kind == "gradient" and check.step == 1])
    if any(check.kind == "layout" for check in failed):
        return Signature.PLACES
    if factors and _all_near(factors, world) and world > 1:
        return Signature.WORLD_TIMES
    if factors and _all_near(factors, copies) and copies > 1:
        return Signature.REPLICAS_TIMES
    if factors and _all_near(factors, 0.5) and len({check.rank for check in failed}) == 1:
        return Signature.ONE_RANK_HALF
    return _by_tensor({(check.kind.split(":")[0], check.tensor.rpartition(".")[2]) for check in failed})


def _by_tensor(wrong: set[tuple[str, str]]) -> Signature | None:
    """By which tensors are wrong, (kind, last word of the name)."""
    gradients = {leaf for kind, leaf in wrong if kind == "gradient"}
    if gradients == {"magnitude"}:
        return Signature.MAGNITUDES_ALONE
    if gradients and "magnitude" not in gradients:
        return Signature.MATRICES_ALONE
    return Signature.CODES if any(kind in {"packed", "decoded"} for kind, _ in wrong) else None


def _factors(failed: list[Check]) -> list[float]:
    """Got / want of each failed gradient, by least squares; nothing where they are not proportional."""
    factors = []
    for check in failed:
        if check.got is None or check.want is None or not check.want.size:
            continue
        got, want = check.got.astype(np.float64).ravel(), check.want.astype(np.float64).ravel()
        square = float(want @ want)
        if not np.isfinite(got).all():
            return []
        factor = float(got @ want) / square if square else 0.0
        if np.linalg.norm(got - factor * want) > _CLOSE * np.linalg.norm(got):
            return []
        factors.append(factor)
    return factors


def _all_near(factors: list[float], wanted: float) -> bool:
    return all(abs(factor - wanted) <= _CLOSE * wanted for factor in factors)
