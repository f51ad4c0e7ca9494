"""Stacks of layers: lattice and one-hot (bitwise), and bounded, over strategies, worlds, storage and dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from parity.case import Case, NeutralCase, StartCase, TrainCase
from parity.cases.declared import FSDP, LAYER, case_of, stack_case
from parity.cases.shapes import DEEP, ODD, PADDED, SHAPES, SINGLE_ROW, THIN, UNEVEN, Shape

_PRECISIONS = (
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("nf4", "float32"),
    ("nf4", "bfloat16"),
)


_DTYPES_AT, _SHAPES_AT = 2, 3
"""Worlds that show them in the quick tier."""


def stack_cases(tier: str) -> list[Case]:
    """All stacks of a tier: the full one has every shape in every bounded case and more worlds."""
    return [
        *_unsharded(),
        *_crosses(),
        *_lattice(),
        *_one_hot(tier),
        *_replicas(),
        *_dropout(tier),
        *_neutral(),
        *_storages(),
        *_methods(),
        *_bounded(tier),
        *_start(),
        *_jax(),
        *_mesh(),
    ]


def _unsharded() -> Iterator[Case]:
    """Link 3: unsharded torch against the oracle, bitwise on lattices and bounded on Gaussian layers."""
    for shape, base in product(SHAPES, ("float32", "nf4")):
        yield stack_case(shape, link="frameworks", inputs="lattice", base=base)
    yield from (stack_case(UNEVEN, link="frameworks", inputs="lattice", **features) for features in _FEATURES)
    for inputs in ("lattice", "gaussian"):
        yield stack_case(UNEVEN, link="frameworks", inputs=inputs, rank_stabilized=True)
    for shape, (base, compute) in product(SHAPES, _PRECISIONS):
        yield stack_case(shape, link="frameworks", inputs="gaussian", base=base, compute=compute, steps=2)
    for features in _FEATURES:
        # a ReLU whose input lies near 0 may flip, and every later step inherits that: one step
        steps = 1 if features.get("activation") == "relu" else 2
        yield stack_case(UNEVEN, link="frameworks", inputs="gaussian", steps=steps, **features)
    for inputs in ("lattice", "gaussian"):
        yield stack_case(DEEP, link="frameworks", inputs=inputs)


_FEATURES: tuple[dict[str, Any], ...] = (
    {"bias": True},
    {"zero_rows": True},
    {"zero_rows": True, "bias": True},
    {"zero_b": True},
    {"bias": True, "activation": "relu"},
)


def _crosses() -> Iterator[Case]:
    """What the grid above leaves out: odd counts, sequences, a bias in bfloat16, rows that are hard for a norm."""
    common = {"link": "frameworks", "inputs": "gaussian", "steps": 2}
    for base, compute in _PRECISIONS:
        yield stack_case(ODD, base=base, compute=compute, **common)
        yield stack_case(UNEVEN, base=base, compute=compute, bias=True, batched=True, **common)
    yield stack_case(UNEVEN, base="nf4", zero_rows=True, **common)
    yield stack_case(UNEVEN, base="nf4", zero_b=True, **common)
    for strategy, base in product(FSDP, ("float32", "nf4")):
        one_hot = {"inputs": "one-hot", "strategy": strategy, "world": 3, "steps": 3}
        yield stack_case(ODD, link="shards", base=base, **one_hot)
    hard = replace(UNEVEN, name="uneven-last", layers=UNEVEN.layers[1:])  # one layer: huge rows would drown a second
    for kind in (StartCase, TrainCase):
        case = case_of(kind, hard, link="frameworks", hard_rows=True)
        yield replace(case, clauses=("D4", "D13", *case.clauses))
    by_factors = case_of(StartCase, hard, link="frameworks", hard_rows=True, subject="jax")
    yield replace(by_factors, clauses=("D4", "D13", "D3"))


def _lattice() -> Iterator[Case]:
    """Link 2, bitwise at every world and under every strategy: the first gradient and the first update."""
    for shape, strategy, world, base in product(SHAPES, FSDP, (1, 2, 3, 4), ("float32", "nf4")):
        yield stack_case(shape, link="shards", inputs="lattice", strategy=strategy, world=world, base=base)
    for features, strategy, world in product(_FEATURES, FSDP, (2, 3)):
        yield stack_case(UNEVEN, link="shards", inputs="lattice", strategy=strategy, world=world, **features)


def _one_hot(tier: str) -> Iterator[Case]:
    """Link 2, bitwise on any data: each rank in turn has the only loss.

    The full tier has all at every world; the quick one the dtypes at world 2, the shapes and paddings at 3.
    """
    for world, strategy in product((2, 3, 4, 8) if tier == "full" else (2, 3), FSDP):
        common = {"link": "shards", "inputs": "one-hot", "strategy": strategy, "world": world, "steps": max(2, world)}
        for shape, base in product((UNEVEN, THIN), ("float32", "nf4")):
            yield stack_case(shape, base=base, **common)
        if tier == "full" or world == _DTYPES_AT:
            for base, compute in _PRECISIONS[1:3] + _PRECISIONS[4:]:
                yield stack_case(UNEVEN, base=base, compute=compute, **common)
            # a bias in float32 that the wire's dtype must not reach either
            yield stack_case(UNEVEN, compute="bfloat16", param_dtype="bfloat16", bias=True, **common)
            yield stack_case(UNEVEN, bias=True, zero_rows=True, **common)
        if tier == "full" or world == _SHAPES_AT:
            # bytes need padding, dense weights do not
            for base, compute in _PRECISIONS if tier == "full" else _PRECISIONS[3:]:
                yield stack_case(PADDED, base=base, compute=compute, **common)
            for base in ("float32", "nf4"):
                yield stack_case(SINGLE_ROW, base=base, **common)
            yield stack_case(UNEVEN, base="nf4", bias=True, zero_rows=True, **common)


def _replicas() -> Iterator[Case]:
    """S9: two rows of two ranks (hsdp), and whole copies (ddp).

    DDP multiplies each gradient by 1/3, rounded, where the twin divides by 3: at three ranks one-hot is not bitwise.
    """
    for (strategy, world), base in product((("hsdp", 4), ("ddp", 2), ("ddp", 3), ("ddp", 4)), ("float32", "nf4")):
        common = {"link": "shards", "strategy": strategy, "world": world, "base": base}
        yield stack_case(UNEVEN, inputs="lattice", **common)
        if (strategy, world) != ("ddp", 3):
            yield stack_case(UNEVEN, inputs="one-hot", steps=world, **common)
    for base in ("float32", "nf4"):
        common = {"link": "shards", "strategy": "hsdp", "world": 4, "base": base}
        yield stack_case(THIN, inputs="lattice", **common)
        yield stack_case(SINGLE_ROW, inputs="one-hot", steps=4, **common)
    for strategy, world in (("hsdp", 4), ("ddp", 3)):
        yield stack_case(UNEVEN, link="shards", inputs="gaussian", strategy=strategy, world=world, steps=2)


def _dropout(tier: str) -> Iterator[Case]:
    """D9, with given masks: bitwise against the oracle, and under every strategy against the same code unsharded."""
    common = {"inputs": "lattice", "dropout": 0.5}
    for shape, base in product((UNEVEN, THIN), ("float32", "nf4")):
        yield stack_case(shape, link="frameworks", base=base, **common)
    for features in _FEATURES:
        yield stack_case(UNEVEN, link="frameworks", **features, **common)
    for strategy, world in (*product(FSDP, (2, 3)), ("hsdp", 4), ("ddp", 2)):
        at = {"link": "shards", "strategy": strategy, "world": world}
        yield stack_case(UNEVEN, bias=True, **at, **common)
        repeated = strategy not in FSDP or (tier == "quick" and world == _DTYPES_AT)
        for base, compute in () if repeated else _PRECISIONS[::2]:
            precision = {"base": base, "compute": compute}
            yield stack_case(UNEVEN, inputs="one-hot", steps=world, dropout=0.5, **precision, **at)


def _bounded(tier: str) -> Iterator[Case]:
    """Link 2 on Gaussian data with every rank contributing: within the derived bound of the unsharded result."""
    shapes = SHAPES if tier == "full" else (UNEVEN, THIN)
    worlds = (2, 3, 4, 8) if tier == "full" else (2, 4)
    for shape, strategy, world, base in product(shapes, FSDP, worlds, ("float32", "nf4")):
        yield stack_case(shape, link="shards", inputs="gaussian", strategy=strategy, world=world, base=base, steps=2)


def _neutral() -> Iterator[Case]:
    """D12: a fresh adapter's output is the plain layer's, to the bit, whatever it is computed in and wherever."""
    fresh = {"bias": True, "clauses": ("D12", "D8")}
    for base, compute in _PRECISIONS:
        yield case_of(NeutralCase, UNEVEN, link="frameworks", base=base, compute=compute, **fresh)
    for strategy, base in product(FSDP, ("float32", "nf4")):
        yield case_of(NeutralCase, UNEVEN, link="shards", strategy=strategy, world=2, base=base, **fresh)


def _storages() -> Iterator[Case]:
    """Q1, Q2, Q6 in training: FP4, scales that are not nested, and blocks of another size."""
    forms = ({"base": "fp4"}, {"base": "nf4", "flat": True}, {"base": "nf4", "blocksize": 128})
    for form in forms:
        yield stack_case(UNEVEN, link="frameworks", inputs="lattice", **form)
        yield stack_case(UNEVEN, link="frameworks", inputs="gaussian", steps=2, **form)
        yield stack_case(UNEVEN, link="shards", inputs="one-hot", strategy="fsdp2", world=3, steps=3, **form)
        yield stack_case(UNEVEN, link="shards", inputs="lattice", strategy="fsdp1", world=2, **form)


def _methods() -> Iterator[Case]:
    """The same layers without a magnitude, `method="lora"`: y = x W' + s (x A') B' + b."""
    lora = {"method": "lora", "bias": True}
    for base in ("float32", "nf4"):
        yield stack_case(UNEVEN, link="frameworks", inputs="lattice", base=base, **lora)
        yield stack_case(UNEVEN, link="shards", inputs="lattice", base=base, strategy="fsdp2", world=2, **lora)
        one_hot = {"inputs": "one-hot", "strategy": "fsdp1", "world": 3, "steps": 3}
        yield stack_case(UNEVEN, link="shards", base=base, compute="bfloat16", **one_hot, **lora)


def _start() -> Iterator[Case]:
    """The magnitude at start (D6), from the weight that the forward uses: unsharded by bound, sharded bitwise."""
    for (base, compute), zero_b in product(_PRECISIONS, (False, True)):
        yield _start_case(UNEVEN, link="frameworks", base=base, compute=compute, zero_b=zero_b)
    for strategy, base in product(FSDP, ("float32", "nf4")):
        yield _start_case(UNEVEN, link="shards", strategy=strategy, world=3, base=base)
    for shape, base, subject in product(SHAPES, ("float32", "nf4"), ("torch_impl", "jax")):
        yield _start_case(shape, inputs="integers", link="frameworks", base=base, subject=subject)


def _start_case(shape: Shape, **fields: Any) -> StartCase:
    case = case_of(StartCase, shape, **fields)
    only = ["D1", "D2", "D3", "D6", "D11", *(["D4", "D13"] if case.inputs == "integers" else [])]
    return replace(case, clauses=(*only, *(c for c in case.clauses if c not in {*LAYER, *only})))


def _jax() -> Iterator[Case]:
    """The same sharding written out in JAX, on virtual devices."""
    for shape, world, base in product((UNEVEN, THIN), (1, 2, 3, 4), ("float32", "nf4")):
        common = {"link": "shards", "subject": "jax", "strategy": "shard-map", "world": world, "base": base}
        yield stack_case(shape, inputs="lattice", **common)
    for shape in (UNEVEN, THIN):
        at = {"link": "training", "subject": "jax", "strategy": "shard-map", "world": 2}
        yield stack_case(shape, inputs="lattice", tokens=32, accumulate=3, **at)
    for shape, world in product((UNEVEN, THIN), (2, 4)):
        yield stack_case(
            shape, inputs="gaussian", link="shards", subject="jax", strategy="shard-map", world=world, steps=2
        )


def _mesh() -> Iterator[Case]:
    """S9, S10: JAX on a mesh of replicas, shards and tensor ranks; `uneven` is cut column, row, `thin` row, column."""
    for shape, mesh, base in product((UNEVEN, THIN), ("1x1x2", "1x2x2", "2x1x2"), ("float32", "nf4")):
        yield _mesh_case(shape, mesh, base=base)
    yield _mesh_case(UNEVEN, "2x2x1")
    yield _mesh_case(UNEVEN, "2x2x2", bias=True, activation="relu")


def _mesh_case(shape: Shape, mesh: str, **fields: Any) -> Case:
    world = math.prod(map(int, mesh.split("x")))
    at = {"subject": "jax-mesh", "strategy": f"mesh-{mesh}", "world": world}
    return stack_case(shape, link="shards", inputs="lattice", **at, **fields)
