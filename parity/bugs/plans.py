"""For each mutant: the cases it is run on, and the tensors whose checks must fail. Imports no framework.

A pair that is missing here is right in spite of the bug: `dm` of the last layer under NormNotDetached, A under
AlignmentIgnored (the first member needs no filler), A and B where only magnitudes are hurt.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How a mutant is tried."""

    keep: str
    """The cases of the quick tier, as `-k` has them."""
    kills: tuple[tuple[str, str], ...]
    """(kind, tensor's last word) of checks that must fail, each at least once."""


_UNSHARDED = "stack/bound/torch_impl/none-w1/uneven/float32-float32/plain"
_ONE_HOT = "stack/one-hot and w3/uneven/float32-float32/plain"
_GRADIENTS = (("gradient", "lora_A"), ("gradient", "lora_B"), ("gradient", "magnitude"))
_MATRICES = _GRADIENTS[:2]
_TRAINED = ("lora_A", "lora_B", "magnitude")
_STATES = tuple((f"optimizer:{name}", leaf) for name in ("exp_avg", "exp_avg_sq") for leaf in _TRAINED)

PLANS = {
    "NormNotDetached": Plan(_UNSHARDED, _MATRICES),
    "AlphaIgnored": Plan(_UNSHARDED, _GRADIENTS),
    "NormAxis": Plan(_UNSHARDED, _GRADIENTS),
    "NormOfDeltaOnly": Plan(_UNSHARDED, _GRADIENTS),
    "MagnitudeFromWrongWeight": Plan(
        "stack/start/torch_impl/none-w1/uneven/nf4-float32", (("parameter", "magnitude"),)
    ),
    "MagnitudeDtype": Plan(
        "stack/lattice/torch_impl and (none-w1 or fsdp2-w2)/uneven-1/bfloat16-bfloat16/plain",
        (("parameter", "magnitude"), ("gradient", "magnitude"), ("optimizer:momentum_buffer", "magnitude")),
    ),
    "NormFromNarrowFactors": Plan("stack/bound/torch_impl/none-w1/uneven/bfloat16-bfloat16/plain", (("norm", "0"),)),
    "ReciprocalRatio": Plan("stack/neutral/torch_impl/none-w1/uneven/float32-float32", (("output", "y"),)),
    "BiasLostOnZeroRows": Plan("lattice and none-w1/uneven/float32-float32/bias+zero-rows", (("output", "y"),)),
    "OutputScaled": Plan("lattice and none-w1/uneven/float32-float32/plain", (("output", "y"), ("loss", "loss"))),
    "BiasScaled": Plan("stack/bound/torch_impl/none-w1/uneven/float32-float32/bias", (("gradient", "magnitude"),)),
    "DropoutOnFactorsOnly": Plan("stack/lattice/torch_impl/none-w1/uneven/float32-float32/dropout-0.5", _GRADIENTS),
    "NibbleSwap": Plan("codec and uneven/nf4-float32/plain", (("packed", "weight"), ("decoded", "weight"))),
    "Nf4TieUp": Plan("codec and ties", (("packed", "weight"), ("decoded", "weight"))),
    "BlocksByRow": Plan("checkpoint/files/torch_impl/none-w1/llama/nf4-float32/written", (("decoded", "weight"),)),
    "StorageCast": Plan("stack/one-hot and fsdp2-w3/uneven/nf4-float32/plain", _GRADIENTS),
    "SumForMean": Plan(_ONE_HOT, _GRADIENTS),
    "ReplicasSummed": Plan("stack/one-hot and hsdp-w4/uneven/float32-float32/plain", _GRADIENTS),
    "MagnitudeGradNotReduced": Plan(_ONE_HOT, (("gradient", "magnitude"),)),
    "ShardSwap": Plan(_ONE_HOT, (*_GRADIENTS, ("parameter", "lora_B"))),
    "ChunkFloor": Plan("stack/one-hot and fsdp2-w3/uneven/float32-float32/plain", (("layout", "lora_B"), *_MATRICES)),
    "AlignmentIgnored": Plan(
        "stack/one-hot and fsdp1-orig-w3/uneven/float32-float32/plain", (("layout", "magnitude"), *_GRADIENTS[1:])
    ),
    "OneRankHalved": Plan(_ONE_HOT, _GRADIENTS),
    "StaleNorm": Plan(_UNSHARDED, _GRADIENTS),
    "AdapterCastOnWire": Plan(_ONE_HOT, _GRADIENTS),
    "AdapterReducedNarrow": Plan("stack/one-hot and fsdp2-w2 and reduce-bfloat16", _GRADIENTS),
    "MeanOfMeans": Plan("training and accumulate-3 and (w2 or w3) and float32-float32", _GRADIENTS),
    "GradNormPerShard": Plan("training and fsdp2-w3/uneven/float32-float32/clip-0.5", _GRADIENTS),
    "LateIgnored": Plan("lattice and fsdp2-w2 and late and counted", (("collectives", "step"),)),
    "RatesLost": Plan("fsdp2-w3/uneven/float32-float32/by-adamw+resume-fsdp2", (("setting", "lr"),)),
    "GeneratorLost": Plan("fsdp2-w3/uneven/float32-float32/by-adamw+resume-fsdp2", (("generator", "after"),)),
    "OptimizerStateLost": Plan("training and fsdp2-w3/uneven/float32-float32/by-adamw+resume-fsdp2", _STATES),
    "DoraSilentlyLora": Plan("files and fsdp2-w4/uneven and read", (("parameter", "magnitude"),)),
    "ShardSavedAsWhole": Plan("files and fsdp2-w4/uneven and written", tuple(("parameter", name) for name in _TRAINED)),
    "OptimizerStateDtype": Plan("stack/bound/torch_impl/none-w1/uneven/float32-float32/by-adamw", _STATES),
}

CONTROLS = ("NormNotDetached", "SumForMean", "MagnitudeGradNotReduced", "NibbleSwap", "OneRankHalved", "StaleNorm")
"""The mutants that every `run` tries (link 5)."""
