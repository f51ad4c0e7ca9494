"""Merged weights (D10), files from one side to the other (C1, C2), and what must be refused (Q7, Q8, C3, C4)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from parity.case import UNSHARDED, Case, CheckpointCase, ExchangeCase, MergeCase, RefuseCase
from parity.cases.declared import case_of
from parity.cases.shapes import LLAMA, THIN, UNEVEN

_PLACES = ((UNSHARDED, 1), ("fsdp1", 3), ("fsdp1-orig", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2))
_REFUSALS = {
    "torch_impl": {
        "nan-weight": "Q7",
        "infinite-weight": "Q7",
        "pickled-adapter": "C3",
        "adapter-lacks-magnitude": "C1",
        "shard-for-adapter": "C4",
        "torn-checkpoint": "C4",
        "foreign-checkpoint": "C3",
    },
    "jax-files": {"other-codebook": "Q8", "nan-encoded": "Q7", "pickled-state": "C3", "shard-for-state": "C4"},
}
"""For each subject, the bad things and the clause that refuses them."""


def file_cases() -> list[Case]:
    """All of them are quick."""
    return [*_merged(), *_exchanged(), *_checkpoints(), *_refused()]


def _merged() -> Iterator[Case]:
    """Link 3: against the oracle, bitwise on lattices. Link 2: from the files of sharded adapters, the same bits."""
    for base, features in product(("float32", "bfloat16", "nf4"), ({}, {"bias": True}, {"zero_b": True})):
        yield _merge(link="frameworks", inputs="lattice", base=base, **features)
    for base in ("float32", "nf4"):
        yield _merge(link="frameworks", inputs="gaussian", base=base, zero_rows=True)
    for base, (strategy, world) in product(("float32", "nf4"), _PLACES[1:]):
        yield _merge(link="shards", inputs="gaussian", base=base, strategy=strategy, world=world)


def _merge(**fields: Any) -> MergeCase:
    """The clauses of the layer that no gradient shows."""
    clauses = ["D10", "D1", "D2", "D3"]
    clauses += ["D6", "Q4", "Q6"] if fields["base"] == "nf4" else []
    clauses += ["D7"] if fields.get("zero_rows") else []
    return case_of(MergeCase, UNEVEN, clauses=tuple(clauses), **fields)


def _exchanged() -> Iterator[Case]:
    """C1: what sharded ranks write the reference reads, and what it writes they read, to the bit."""
    for direction, (strategy, world) in product(("written", "read"), _PLACES):
        whole = ("C4",) if direction == "written" and strategy != UNSHARDED else ()  # the reader finds no rank's part
        at = {"direction": direction, "strategy": strategy, "world": world, "clauses": ("C1", "D1", *whole)}
        for shape, features in ((UNEVEN, {"rank_stabilized": True}), (THIN, {"base": "nf4"})):
            yield case_of(ExchangeCase, shape, link="frameworks", **at, **features)


def _checkpoints() -> Iterator[Case]:
    """C2: what transformers and bitsandbytes wrote, both sides read as it is, bytes and numbers, to the bit."""
    unsharded = ({}, {"flat": True}, {"base": "fp4", "compute": "bfloat16"}, {"storage": "float32"})
    for features in unsharded:
        yield _checkpoint(**features)
    yield _checkpoint(strategy="fsdp1", world=3, storage="bfloat16", compute="bfloat16")
    yield _checkpoint(strategy="fsdp1-orig", world=2, storage="float32", flat=True)
    yield _checkpoint(strategy="fsdp2", world=4, storage="float16")


def _checkpoint(**features: Any) -> CheckpointCase:
    clauses = ["C2", "Q1", "Q2", "Q3", "Q4"]
    clauses += [] if features.get("flat") else ["Q6"]
    clauses += ["S6"] if "world" in features else []
    fields = {"base": "nf4", **features}
    return CheckpointCase(
        link="frameworks",
        layers=LLAMA.layers,
        shape_name=LLAMA.name,
        rank=LLAMA.rank,
        alpha=LLAMA.scaling * LLAMA.rank,
        clauses=tuple(clauses),
        **fields,
    )


def _refused() -> Iterator[Case]:
    for subject, refusals in _REFUSALS.items():
        for bad, clause in refusals.items():
            at = {"bad": bad, "subject": subject, "base": "nf4", "clauses": (clause,)}
            yield case_of(RefuseCase, UNEVEN, link="frameworks", **at)
