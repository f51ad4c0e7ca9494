"""Which known bug a failure looks like: what the wrong shards have in common, in numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

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
    world = result.case.world
    wrong = {(check.kind.split(":")[0], check.tensor.rpartition(".")[2]) for check in failed}
    ranks = {check.rank for check in failed}
    factors = _factors([check for check in failed if check.kind == "gradient" and check.step == 1])
    if any(check.kind == "layout" for check in failed):
        return "ChunkFloor or AlignmentIgnored: a rank holds another part than S1 and S2 give it"
    if factors and _all_near(factors, world) and world > 1:
        return "SumForMean: gradients are the world size too large (S3)"
    if factors and _all_near(factors, result.case.copies) and result.case.copies > 1:
        return "ReplicasSummed: gradients are the number of replicas too large (S9)"
    if factors and _all_near(factors, 0.5) and len(ranks) == 1:
        return f"OneRankHalved: rank {min(ranks)} has half of its gradient"
    return _by_tensor(wrong)


def _by_tensor(wrong: set[tuple[str, str]]) -> str:
    """By which tensors are wrong, (kind, last word of the name)."""
    gradients = {leaf for kind, leaf in wrong if kind == "gradient"}
    if gradients == {"magnitude"}:
        return "MagnitudeGradNotReduced: only magnitude gradients are wrong (S11)"
    if gradients and "magnitude" not in gradients:
        return "NormNotDetached: A and B are wrong and magnitudes right, as when the norm is differentiated (D5)"
    if any(kind in {"packed", "decoded"} for kind, _ in wrong):
        return "NibbleSwap, Nf4TieUp: the 4-bit codec differs (Q3 to Q5)"
    return ""


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
