"""Two checks on all ranks together: that they hold every element of every tensor, and hold it where S1 and S2 say.

An element lies on one rank, or on as many as there are replicas (S9): who holds it twice does not shard it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from parity.case import Case
from parity.checks.clauses import clauses_of
from parity.checks.expectation import OBSERVED, PER_TOKEN, Expectations, is_frozen, required
from parity.checks.shard_check import Check, failure
from parity.oracle.prediction import Key, Layouts
from parity.shard import Shard, describe_index

EVERYWHERE = ("offset", *OBSERVED)
"""Kinds that every rank has whole: of a quant state (S6), and what a layer computes from gathered parameters."""
HeldBy = Callable[[Key], int]
"""From a tensor at a step to the number of ranks that hold each element of it."""


def copies_of(case: Case, key: Key) -> int:
    """One, or as many as there are replicas after that step (S9); where every rank has it, the world size.

    Tensor ranks see the same tokens, and of a layer each has a part or the whole, tensor by tensor (S10).
    """
    step, kind, name = key
    shared = case.tensor_ranks
    if kind in PER_TOKEN:
        return shared
    if kind in EVERYWHERE:
        by_rows = kind in OBSERVED and shared > 1 and not case.is_row_parallel(name)
        return case.world // shared if by_rows else case.world
    return case.copies_at(step) * (shared if shared > 1 and _is_whole(case, name) else 1)


_BY_OUTPUTS = ("lora_B", "magnitude", "bias.value")
"""What has a part for each output feature, besides the weight."""


def _is_whole(case: Case, name: str) -> bool:
    """S10: whether each tensor rank has all of a layer's tensor."""
    layer = next((name.removesuffix(f".{leaf}") for leaf in (*_BY_OUTPUTS, "lora_A") if name.endswith(f".{leaf}")), "")
    return bool(layer) and case.is_row_parallel(layer) == name.endswith(_BY_OUTPUTS)


def missing_elements(
    shards: Iterable[Shard], expectations: Expectations, held_by: HeldBy | None = None, *, gives: tuple[str, ...] = ()
) -> list[Check]:
    """A failed check for each tensor that the ranks do not give in full, or not as often as `held_by` says.

    None leaves open how often: then all elements of a tensor must lie on equally many ranks. `gives` is what the
    implementation declares beside gradients, parameters and state.
    """
    held: dict[Key, np.ndarray] = {
        key: np.zeros(expectations[key].value.shape, dtype=np.int16) for key in required(expectations, gives)
    }
    for shard in shards:
        if shard.key in held:
            _count(held[shard.key], shard)
    faults = ((key, _fault(counts, held_by and held_by(key))) for key, counts in sorted(held.items()))
    return [
        failure(key, -1, f"coverage: {said}", worst=float(lost), clauses=expectations[key].clauses)
        for key, (lost, said) in faults
        if lost
    ]


def frozen_gradients(shards: Iterable[Shard]) -> list[Check]:
    """A failed check for each frozen tensor that has a gradient: an optimizer would train it."""
    trained = {
        (shard.rank, shard.step, shard.name) for shard in shards if shard.kind == "gradient" and is_frozen(shard)
    }
    fault = "a frozen tensor has a gradient"
    return [failure((step, "gradient", name), rank, fault) for rank, step, name in sorted(trained)]


def _count(counts: np.ndarray, shard: Shard) -> None:
    try:
        part = shard.part_of(counts)
    except IndexError:
        return  # `check_shard` reports an index that does not fit
    part += 1  # a view: the index is one of slices


def _fault(counts: np.ndarray, copies: int | None) -> tuple[int, str]:
    """How many elements lie on the wrong number of ranks, and that in words."""
    lost = int((counts == 0).sum())
    if lost:
        return lost, f"{lost} of {counts.size} elements on no rank"
    wanted = copies or int(counts.min(initial=np.iinfo(counts.dtype).max))
    wrong = counts[counts != wanted]
    often = " or ".join(map(str, np.unique(wrong)))
    return wrong.size, f"{wrong.size} of {counts.size} elements on {often} ranks, wanted {wanted}"


def check_layout(case: Case, shards: Iterable[Shard], layouts: Layouts) -> list[Check]:
    """Where each rank says its parameters lie, against S1 and S2."""
    clauses = clauses_of(case, (0, "layout", ""), "layout")
    held = [shard for shard in shards if shard.kind == "parameter" and shard.step == 0]
    absent = sorted(set(layouts) - {(shard.name, shard.rank) for shard in held})
    unknown = [shard for shard in held if (shard.name, shard.rank) not in layouts]
    said = {"against": "layout", "clauses": clauses}
    return [
        *(
            _place_check(shard, layouts[shard.name, shard.rank], clauses)
            for shard in held
            if (shard.name, shard.rank) in layouts
        ),
        *(failure((0, "layout", name), rank, "this rank says nothing of it", **said) for name, rank in absent),
        *(failure((0, "layout", s.name), s.rank, "the reference knows no such parameter", **said) for s in unknown),
    ]


def _place_check(shard: Shard, wanted: tuple[slice, ...], clauses: tuple[str, ...]) -> Check:
    if _range(shard.index, shard.global_shape) != _range(wanted, shard.global_shape):
        about = {"index": shard.index, "against": "layout", "clauses": clauses}
        return failure((0, "layout", shard.name), shard.rank, f"wanted {describe_index(wanted)}", **about)
    return Check(
        tensor=shard.name,
        kind="layout",
        step=0,
        rank=shard.rank,
        index=shard.index,
        mode="bits",
        worst=0.0,
        limit=0.0,
        ratio=0.0,
        passed=True,
        against="layout",
        clauses=clauses,
    )


def _range(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    """Slices as numbers; all empty parts are alike, and a whole tensor is the same said either way."""
    ranges = tuple((part.start, part.stop) for part in index)
    if any(start == stop for start, stop in ranges):
        return ("empty",)
    if len(index) == len(shape) and all(r == (0, size) for r, size in zip(ranges, shape, strict=True)):
        return ("flat", 0, int(np.prod(shape)))
    if len(index) == 1 and len(shape) != 1:
        return ("flat", *ranges[0])
    return ranges
