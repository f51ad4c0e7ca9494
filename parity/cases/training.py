"""Link 4: how a step is made changes no result, and a run may be stopped and gone on with.

Compared with the unsharded run in one go: bitwise on lattices (T1, T2, T5: sums are exact) and with a one-hot rank (T4
to T6, S12: no sum has two terms). The unsharded run itself is compared with the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from parity.case import UNSHARDED, Case
from parity.cases.declared import stack_case
from parity.cases.shapes import SINGLE_ROW, THIN, UNEVEN

Places = tuple[tuple[str, int], ...]
"""Strategies, each at a world size."""

_PARTS = 3
"""Forwards of an accumulated step, unequal ones."""
_TOKENS = 32
"""A power of two, so that the mean over tokens is exact."""
_CLIP = 0.5
"""Far below the norm of any case's gradient."""
_FAINT_CLIP = 2.0**-14
"""Below the norm of a faint one, which is so small that the addend to it counts (S5)."""
_WIDE_CLIP = 65536.0
"""Far above it."""
_QUICK: Places = (("fsdp1", 2), ("fsdp1-orig", 3), ("fsdp2", 3), ("hsdp", 4), ("ddp", 2))
_DENSE: Places = (("fsdp1", 2), ("fsdp2", 3))
"""Where the quick tier disturbs steps of dense weights: the two ways to cut them."""
_FULL: Places = (*_QUICK, ("fsdp1", 4), ("fsdp1-orig", 4), ("fsdp2", 4), ("fsdp2", 8), ("ddp", 4))


def training_cases(tier: str) -> list[Case]:
    """Every strategy once; in the full tier at more worlds, and more shapes and storage."""
    places = _QUICK if tier == "quick" else _FULL
    shapes = (UNEVEN,) if tier == "quick" else (UNEVEN, THIN, SINGLE_ROW)
    declared = [*_lattices(places), *_steps(places), *_resharded()]
    for shape, base in product(shapes, ("float32", "nf4")):
        declared += _undisturbed(places if tier == "full" or base == "nf4" else _DENSE, shape=shape, base=base)
    return declared


def _lattices(places: Places) -> Iterator[Case]:
    """T1: unequal parts of a batch, reduced after each or once (T5). T2, S5: clipped by the norm of all shards."""
    lattice = {"link": "training", "inputs": "lattice"}
    for strategy, world in ((UNSHARDED, 1), *places):
        at = {"strategy": strategy, "world": world, **lattice}
        for late in (False, True):
            yield stack_case(UNEVEN, accumulate=_PARTS, late=late, tokens=_TOKENS, **at)
    for strategy, world in ((UNSHARDED, 1), *places):
        yield stack_case(UNEVEN, clip=_CLIP, strategy=strategy, world=world, **lattice)
    yield stack_case(UNEVEN, clip=_WIDE_CLIP, **lattice)
    yield stack_case(UNEVEN, clip=_FAINT_CLIP, faint=True, **lattice)
    yield stack_case(
        UNEVEN, accumulate=_PARTS, late=True, tokens=_TOKENS, base="nf4", strategy="fsdp2", world=2, **lattice
    )


def _steps(places: Places) -> Iterator[Case]:
    """T3, T4: AdamW with its moments in float32, on every shard; a narrow reduction that must not reach adapters."""
    for base in ("float32", "nf4"):
        yield stack_case(UNEVEN, link="training", inputs="gaussian", optimizer="adamw", base=base, steps=2)
    for strategy, world in (("fsdp2", 2), ("hsdp", 4)):
        at = {"strategy": strategy, "world": world}
        yield stack_case(UNEVEN, link="training", inputs="gaussian", optimizer="adamw", steps=2, **at)
    for strategy, world in places:
        yield _one_hot(UNEVEN, strategy, world, optimizer="adamw")
    narrow = {"compute": "bfloat16", "param_dtype": "bfloat16", "reduce_dtype": "bfloat16"}
    for strategy, world in (("fsdp1", 2), ("fsdp1-orig", 2), ("fsdp2", 2)):
        yield _one_hot(UNEVEN, strategy, world, **narrow)


def _undisturbed(places: Places, **fields: Any) -> Iterator[Case]:
    """T5: activations computed again. T6: saved halfway, and gone on with from what was read."""
    for strategy, world in places:
        yield _one_hot(strategy=strategy, world=world, recompute=True, **fields)
        yield _one_hot(strategy=strategy, world=world, resume=strategy, optimizer="adamw", **fields)


def _resharded() -> Iterator[Case]:
    """S12: what two shards wrote four read, what four wrote one, and ranges of flat parameters become rows."""
    for before, after, world in (
        ("hsdp", "fsdp2", 4),
        ("fsdp2", "ddp", 4),
        ("fsdp1", "fsdp2", 3),
        ("ddp", "fsdp1-orig", 2),
        ("fsdp2", "hsdp", 4),
    ):
        yield _one_hot(UNEVEN, before, world, resume=after)


def _one_hot(shape: Any, strategy: str, world: int, **fields: Any) -> Case:
    at = {"strategy": strategy, "world": world, "steps": max(2, world)}
    return stack_case(shape, link="training", inputs="one-hot", **at, **fields)
