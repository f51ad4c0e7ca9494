"""Which clauses a check bears on: of those that its case claims, the few that could show in this tensor."""

from __future__ import annotations

from parity.case import Case
from parity.oracle.prediction import Key

_LAYER = ("D1", "D2", "D3", "D7", "D9", "D13", "D16")
"""Whatever the layer computes goes through these."""
_STORED = ("Q1", "Q2", "Q3", "Q4", "Q5", "Q6")
_REDUCED = ("S3", "S6", "S8", "S9", "S10", "S4")
_STEPPED = ("T1", "T2", "S5", "T5", "T6", "S12")

_BY_KIND: dict[str, tuple[str, ...]] = {
    "output": (*_LAYER, "D8", "D12", "Q4", "Q6", "S8", "S10"),
    "loss": (*_LAYER, "D8", "S3", "S10"),
    "input_gradient": (*_LAYER, "D5", "G1", "Q4", "Q6", "S3", "S8", "S10"),
    "norm": ("D2", "D3", "D4", "D13", "D11", "S4", "S10"),
    "ratio": ("D3", "D7", "D11", "S10"),
    "collectives": ("S7", "S9", "S10", "S11", "T5"),
    "setting": ("T3", "T6"),
    "generator": ("T6", "D9"),
    "merged": ("D1", "D2", "D3", "D6", "D7", "D10", "Q4", "Q6"),
    "scaling": ("D1", "C1"),
    "packed": ("C2", *_STORED, "S6"),
    "absmax": ("C2", *_STORED),
    "decoded": ("C2", *_STORED, "S6"),
    "offset": ("Q4", "Q6"),
    "layout": ("S1", "S2", "S7", "S9", "S10"),
    "digest": ("S6",),
}
_GRADIENTS: dict[str, tuple[str, ...]] = {
    "lora_A": (*_LAYER, "D11", "D5", "G1", "G2", "D6", "Q4", "Q6", *_REDUCED, *_STEPPED),
    "lora_B": (*_LAYER, "D11", "D5", "D12", "G1", "G2", "D6", "Q4", "Q6", *_REDUCED, *_STEPPED),
    "magnitude": (*_LAYER, "D11", "D8", "G1", "G2", "Q4", "Q6", "S11", *_REDUCED, *_STEPPED),
}
_PARAMETERS = ("D6", "D4", "D11", "D13", "T3", "T4", "T6", "S1", "S12", "C1", "C4", "T2", "S5")
_STATES = ("D11", "T3", "T4", "T6", "S12")


def clauses_of(case: Case, key: Key, against: str) -> tuple[str, ...]:
    """Those of the case's clauses that a comparison of this tensor can break.

    A twin is the same code unsharded: against it only the clauses of sharding and of stepping can break.
    """
    possible = _possible(key)
    if against == "twin":
        possible = tuple(clause for clause in possible if clause[0] in "STC" or clause in {"D10", "D11"})
    return tuple(clause for clause in case.clauses if clause in possible)


def _possible(key: Key) -> tuple[str, ...]:
    step, kind, name = key
    leaf = name.rpartition(".")[2]
    if kind == "setting" and name == "forwards":
        return ("T1", "T5")
    if kind == "gradient":
        return _GRADIENTS.get(leaf, ())
    if kind.startswith("optimizer:"):
        return _STATES
    if kind == "parameter":
        if leaf in _GRADIENTS:
            start = ("D1", "D2", "D3", "Q4", "Q6") if step == 0 else ()
            return (*_PARAMETERS, *start)
        return ("S6", "Q3", "Q4", "Q5", "Q6", "C2")
    return _BY_KIND.get(kind, ())
