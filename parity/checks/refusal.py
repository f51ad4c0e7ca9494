"""What must be refused, with words that say what is wrong with it (Q7, Q8, C1, C3, C4). Imports no framework.

An implementation is given something sound, which it must take, then something bad. A refusal gives no shard: that the
bad thing is taken is the failed check.
"""

from __future__ import annotations

from parity.case import RefuseCase
from parity.checks.shard_check import Check

NAMED = {
    "nan-weight": ("layers.1", "(3, 5)"),
    "infinite-weight": ("layers.1", "(3, 5)"),
    "other-codebook": ("codebook",),
    "nan-encoded": ("(3, 5)",),
    "pickled-adapter": ("adapter_model.safetensors",),
    "adapter-lacks-magnitude": ("layers.1.magnitude",),
    "shard-for-adapter": ("lora_B", "(25, 4)", "(50, 4)"),
    "pickled-state": ("state.safetensors",),
    "shard-for-state": ("lora_B", "(25, 4)", "(50, 4)"),
    "torn-checkpoint": (".safetensors", "size or checksum"),
    "foreign-checkpoint": ("pickle.bin",),
}
"""For each bad thing, the words that the refusal must hold: which tensor or file, and where or how."""


def check_refusal(case: RefuseCase, said: str) -> Check:
    """Whether it was refused, and everything named."""
    missing = [word for word in NAMED[case.bad] if word not in said]
    fault = f"the refusal does not name {', '.join(missing)}: {said}" if missing else ""
    return Check(
        tensor=case.bad,
        kind="refusal",
        step=0,
        rank=0,
        index=(),
        mode="",
        fault=fault if said else "it was taken",
        worst=float(len(missing)),
        limit=0.0,
        ratio=None if missing else 0.0,
        passed=not missing,
        against="refusal",
        clauses=case.clauses,
    )
