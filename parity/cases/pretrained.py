"""SmolLM2-135M (or any Llama-family checkpoint): adapters on every linear layer, real text, world 2."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from parity.case import UNSHARDED, NetworkCase
from parity.cases.declared import LAYER, SHARDED

Sharded = tuple[tuple[str, tuple[str, str]], ...]
"""(strategy, (base, compute)) of link 2."""
Whole = tuple[tuple[str, str], ...]
"""(strategy, base) of link 3."""

_STRATEGIES = ("fsdp1", "fsdp1-orig", "fsdp2")
_PRECISIONS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("nf4", "float32"), ("nf4", "bfloat16"))
_SHARDED: Sharded = tuple(product(_STRATEGIES, _PRECISIONS))
_WHOLE: Whole = tuple(product(_STRATEGIES, ("float32", "nf4")))
_QUICK_SHARDED: Sharded = (
    ("fsdp1", ("nf4", "float32")),
    ("fsdp1-orig", ("float32", "float32")),
    ("fsdp2", ("bfloat16", "bfloat16")),
    ("fsdp2", ("nf4", "bfloat16")),
)
_QUICK_WHOLE: Whole = (("fsdp1", "nf4"), ("fsdp1-orig", "float32"), ("fsdp2", "nf4"))
_WORLD = 2
_ONE_HOT_TOKENS = 32
"""Bitwise whatever their number; processors that have no products of bfloat16 take long for many."""
QUICK_BLOCKS = 2
ALL_BLOCKS = 30


def pretrained_cases(tier: str) -> list[NetworkCase]:
    """Two blocks, in the quick tier each strategy and each precision; all blocks besides in the full one."""
    if tier == "quick":
        return [*_declare(QUICK_BLOCKS, _QUICK_SHARDED, _QUICK_WHOLE), *_disturbed(("nf4", "bfloat16"))]
    declared = [case for blocks in (QUICK_BLOCKS, ALL_BLOCKS) for case in _declare(blocks, _SHARDED, _WHOLE)]
    declared += [_tensor_ranks(base, strategy="tp", world=3) for base in ("float32", "nf4")]
    declared += [_tensor_ranks("nf4", strategy="fsdp2-tp", world=6, tensor=3)]
    return declared + [case for precision in _PRECISIONS for case in _disturbed(precision, resumes=True)]


def _tensor_ranks(base: str, **at: Any) -> NetworkCase:
    """S10: three, as there are nine heads and three of keys; sums in another order, so that no twin has their bits."""
    return _case(link="frameworks", inputs="text", blocks=QUICK_BLOCKS, base=base, **at)


def _case(**fields: Any) -> NetworkCase:
    clauses = (*LAYER, *(("Q4", "Q6", "D6", "S6") if fields["base"] == "nf4" else ()))
    sharded = fields.get("strategy", UNSHARDED) != UNSHARDED
    # stacks show units and their order; where it stands is a parameter's, and link 3 compares gradients
    elsewhere = ("S7", "S1") if fields["inputs"] == "text" else ("S7",)
    tensor = "tp" in fields.get("strategy", "")
    clauses += tuple(c for c in SHARDED if c not in elsewhere) if sharded and fields["strategy"] != "tp" else ()
    clauses += ("S10",) if tensor else ()
    clauses += ("T5",) if fields.get("recompute") else ()
    clauses += ("T6", "T3") if fields.get("resume") else ()
    tokens = 128 if fields["inputs"] == "text" else _ONE_HOT_TOKENS
    return NetworkCase(rank=8, alpha=12.0, tokens=tokens, clauses=clauses, **fields)


def _declare(blocks: int, sharded: Sharded, whole: Whole) -> Iterator[NetworkCase]:
    """Link 2 with a one-hot rank (bitwise), and link 3 within `sensitivity` where the network is float32."""
    for strategy, (base, compute) in sharded:
        fields = {"strategy": strategy, "world": _WORLD, "base": base, "compute": compute, "blocks": blocks}
        yield _case(link="shards", inputs="one-hot", steps=2, **fields)
    for strategy, base in whole:
        fields = {"strategy": strategy, "world": _WORLD, "base": base, "blocks": blocks}
        yield _case(link="frameworks", inputs="text", **fields)


def _disturbed(precision: tuple[str, str], *, resumes: bool = False) -> Iterator[NetworkCase]:
    """T5, T6: activations computed again, as `torch_impl train` has it; saved, and gone on with.

    Under the same strategy, since a rank's frozen weights are compared by the digest of its own part of each.
    """
    base, compute = precision
    at = {"link": "training", "inputs": "one-hot", "strategy": "fsdp2", "world": _WORLD, "blocks": QUICK_BLOCKS}
    yield _case(base=base, compute=compute, steps=2, recompute=True, **at)
    if resumes:
        yield _case(base=base, compute=compute, steps=2, resume="fsdp2", optimizer="adamw", **at)
