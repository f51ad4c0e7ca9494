"""Known bugs by name: what is wrong, what it does, where it was seen. Each has a mutant that the suite must kill."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """A bug that somebody shipped, or that sharding invites."""

    name: str
    """As SPEC.md and reports cite it."""
    bug: str
    """What the code does."""
    effect: str
    """What a user gets."""
    source: str
    """Where it was seen, or what invites it."""
    clauses: tuple[str, ...]
    """What it violates."""


FLAGS = {
    flag.name: flag
    for flag in (
        Flag(
            "NormNotDetached",
            "differentiates through the norm",
            "outputs are right, gradients of A and B are not",
            "four small JAX ports",
            ("D5",),
        ),
        Flag("AlphaIgnored", "takes the scaling to be 1", "the adapter's share is wrong", "fsdp_qlora#68", ("D1",)),
        Flag(
            "NormAxis",
            "takes the norm over the output axis",
            "rows are scaled by other rows' norms",
            "peft#2348, NVlabs/DoRA#11",
            ("D3",),
        ),
        Flag(
            "NormOfDeltaOnly",
            "takes the norm of s B A instead of W + s B A",
            "c explodes near the start",
            "dora-from-scratch#3, torchtune#893",
            ("D2", "D3"),
        ),
        Flag(
            "MagnitudeFromWrongWeight",
            "starts m from the weight before it was quantised",
            "the layer does not start neutral",
            "mlx-examples#832",
            ("D6",),
        ),
        Flag(
            "MagnitudeDtype",
            "holds the magnitude in bfloat16",
            "small updates are no-ops",
            "trl#7268",
            ("D11",),
        ),
        Flag(
            "NormFromNarrowFactors",
            "takes the norm of A and B cast to the compute dtype",
            "in bfloat16 n is off by a thousandth",
            "peft, whose norm is taken in the compute dtype",
            ("D4", "D11"),
        ),
        Flag(
            "ReciprocalRatio",
            "multiplies m by the reciprocal of n",
            "a fresh adapter moves the output on some rows by an ulp",
            "XLA, which turns m / sqrt(x) into m * rsqrt(x)",
            ("D12",),
        ),
        Flag(
            "BiasLostOnZeroRows",
            "gives 0 where the norm is 0",
            "a zero row loses its bias",
            "guards against the division by 0 that cover too much",
            ("D7",),
        ),
        Flag(
            "OutputScaled",
            "gives other outputs than it differentiates",
            "the loss is another function than the gradients are of",
            "hand-written backward passes",
            ("D2",),
        ),
        Flag("BiasScaled", "scales the bias too", "outputs are off by (c - 1) b", "torchtune, fsdp_qlora", ("D8",)),
        Flag(
            "DropoutOnFactorsOnly",
            "drops the input of A and B, and scales all of x W'",
            "magnitudes learn from what was dropped",
            "torchtune, mlx-lm",
            ("D9",),
        ),
        Flag("NibbleSwap", "packs element 0 in the low nibble", "neighbours change places", "ports of NF4", ("Q3",)),
        Flag("Nf4TieUp", "rounds a tie to the upper code", "bytes differ at midpoints", "ports of NF4", ("Q5",)),
        Flag(
            "BlocksByRow",
            "begins a block anew with each row",
            "where blocks run across rows, weights have another block's scale",
            "bitsandbytes 0.50's CPU decoder with AVX-512",
            ("Q1", "Q4"),
        ),
        Flag(
            "StorageCast",
            "casts packed bytes to another 16-bit dtype on the wire",
            "finite garbage, no warning",
            "bitsandbytes#1945",
            ("S6",),
        ),
        Flag("SumForMean", "sums gradients over ranks", "gradients world times too large", "FSDP's divisor", ("S3",)),
        Flag(
            "ReplicasSummed",
            "sums gradients across replicas instead of averaging them",
            "every step is as many times too long as there are replicas",
            "hybrid sharding's two reductions (S9)",
            ("S3", "S9"),
        ),
        Flag(
            "MagnitudeGradNotReduced",
            "never reduces the magnitude's gradient across ranks",
            "magnitudes drift apart, or follow one rank's data",
            "axolotl (S11)",
            ("S3", "S11"),
        ),
        Flag("ShardSwap", "gives two ranks each other's shard", "parameters are permuted", "resharding", ("S1",)),
        Flag("ChunkFloor", "cuts dim 0 by floor instead of ceil", "indices are off", "hand-made sharding", ("S1",)),
        Flag(
            "AlignmentIgnored",
            "lays members out without their alignment",
            "indices are off after the first member",
            "hand-made flat parameters",
            ("S2",),
        ),
        Flag("OneRankHalved", "halves the gradient on one rank", "one slice learns slowly", "loss scaling", ("S3",)),
        Flag(
            "StaleNorm",
            "keeps the norm of the first step",
            "right at first, wrong from the second step on",
            "caching",
            ("D2", "D3"),
        ),
        Flag(
            "AdapterCastOnWire",
            "lets param_dtype reach A, B and the magnitude",
            "|c - 1| of 3e-3 at the start",
            "FSDP mixed precision",
            ("D11",),
        ),
        Flag(
            "AdapterReducedNarrow",
            "lets the reduction's dtype reach A, B and the magnitude",
            "gradients are rounded to bfloat16 on their way over the ranks",
            "FSDP mixed precision",
            ("D11", "T4"),
        ),
        Flag(
            "MeanOfMeans",
            "averages the mean losses of micro-batches",
            "a token of a short part weighs more; accumulation is not one large batch",
            "transformers#34191",
            ("S3", "T1"),
        ),
        Flag(
            "GradNormPerShard",
            "clips each rank's shard by the shard's own norm",
            "ranks take steps of different lengths",
            "pytorch#88621",
            ("S5", "T2"),
        ),
        Flag(
            "LateIgnored",
            "reduces gradients with every backward pass of a step",
            "accumulation costs as many reductions as it has forwards",
            "no_sync that is not heeded",
            ("T5",),
        ),
        Flag(
            "RatesLost",
            "resumes with the learning rate that the optimizer was made with",
            "the schedule begins anew, or stands still",
            "optimizers rebuilt from options",
            ("T6",),
        ),
        Flag(
            "GeneratorLost",
            "resumes without the generators' states",
            "dropout draws other masks than the run that was never stopped",
            "checkpoints without generators",
            ("T6",),
        ),
        Flag(
            "OptimizerStateLost",
            "resumes with a fresh optimizer",
            "moments begin at zero again: the loss jumps, and the run is another one",
            "transformers#25849",
            ("T6",),
        ),
        Flag(
            "OptimizerStateDtype",
            "holds AdamW's moments in bfloat16",
            "1 - b2 is below half a unit in the last place: second moments stand still",
            "torchtitan#2732, an option there",
            ("D11", "T4"),
        ),
        Flag(
            "DoraSilentlyLora",
            "leaves the magnitudes out of what is written or read",
            "a trained DoRA comes back with magnitudes as at the start",
            "axolotl#1589, unsloth-zoo#954, torchtune#2250",
            ("C1",),
        ),
        Flag(
            "ShardSavedAsWhole",
            "writes one rank's part under the whole's name",
            "a file that loads, and holds zeros where other ranks' rows were",
            "accelerate#4206",
            ("C4",),
        ),
    )
}
