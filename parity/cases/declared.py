"""What declares a stack, and the clauses that follow from what it declares."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from parity.case import UNSHARDED, StackCase, StartCase, TrainCase
from parity.cases.shapes import DENSE_LATTICE_SCALING, Shape

LAYER = ("D1", "D2", "D3", "D5", "D11", "G1")
"""Every DoRA layer's."""
SHARDED = ("S1", "S3", "S7", "S8", "S11")
"""Every sharded one's."""


FSDP = ("fsdp1", "fsdp1-orig", "fsdp2")
"""The strategies that cut every tensor over all ranks."""


Kind = TypeVar("Kind", bound=StackCase)


def stack_case(shape: Shape, **fields: Any) -> TrainCase:
    """A stack that trains, and the clauses that its features add."""
    return case_of(TrainCase, shape, **fields)


def case_of(kind: type[Kind], shape: Shape, **fields: Any) -> Kind:
    """The same of any kind."""
    clauses = list(LAYER)
    clauses += ["D7"] if fields.get("zero_rows") else []
    clauses += ["D8"] if fields.get("bias") else []
    clauses += ["D9"] if fields.get("dropout") else []
    clauses += ["D12"] if fields.get("zero_b") else []
    clauses += ["Q4", "D6"] if fields.get("base") in {"nf4", "fp4"} else []
    clauses += ["Q6"] if fields.get("base") in {"nf4", "fp4"} and not fields.get("flat") else []
    clauses += ["T3"] if kind is not StartCase else []
    clauses += _training_clauses(fields)
    if fields.get("strategy", UNSHARDED) != UNSHARDED:
        clauses += {"ddp": ["S3"], "tp": []}.get(fields["strategy"], SHARDED)
        clauses += ["S2"] if fields["strategy"].startswith("fsdp1") else []
        clauses += ["T5"] if fields.get("late") else []
        clauses += _mesh_clauses(fields["strategy"])
        clauses += ["S4"] if fields["strategy"] == "shard-map" else []  # the one form that takes norms locally
        clauses += ["S6"] if fields.get("base") in {"nf4", "fp4"} else []
    inputs = fields.get("inputs", "gaussian")
    if inputs == "one-hot":  # a twin is the same code: it shows how that is sharded, not that it is right
        clauses = [clause for clause in clauses if clause[0] in "ST" or clause == "D11"]
    clauses = list(dict.fromkeys(clauses))
    scaling = shape.scaling
    if inputs in {"lattice", "integers"}:
        scaling = shape.packed_lattice_scaling if fields.get("base") in {"nf4", "fp4"} else DENSE_LATTICE_SCALING
    divisor = math.sqrt(shape.rank) if fields.get("rank_stabilized") else shape.rank
    fields = {"rank": shape.rank, "alpha": scaling * divisor, "clauses": tuple(clauses), **fields}
    return kind(layers=shape.layers, shape_name=shape.name, **fields)


def _mesh_clauses(strategy: str) -> list[str]:
    """S9 where there are replicas, S10 where there are tensor ranks."""
    if strategy in {"tp", "fsdp2-tp"}:
        return ["S10"]
    if not strategy.startswith("mesh-"):
        return ["S9"] if strategy in {"hsdp", "fsdp1-hybrid", "ddp"} else []
    replicate, _, tensor = map(int, strategy.removeprefix("mesh-").split("x"))
    return [*(["S9"] if replicate > 1 else []), *(["S10"] if tensor > 1 else [])]


def _training_clauses(fields: dict[str, Any]) -> list[str]:
    """What the ways to make a step add (link 4)."""
    resume = fields.get("resume", "")
    added = {
        "T1": "accumulate" in fields,
        "T2": "clip" in fields,
        "S5": "clip" in fields,
        "T4": "optimizer" in fields or "reduce_dtype" in fields,
        "T5": fields.get("late") or fields.get("recompute"),
        "T6": resume,
        "S12": resume and resume != fields.get("strategy", UNSHARDED),
    }
    return [clause for clause, is_added in added.items() if is_added]
