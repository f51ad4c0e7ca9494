"""Bugs of the reference's forms: what only they have (S4, S10, G2) or refuse (Q8), and only their cases see."""

from __future__ import annotations

from parity.bugs.record import Bug

REFERENCE = (
    Bug(
        name="DifferencesOfTheLayer",
        bug="takes differences of the layer itself, whose norm moves with A and B",
        effect="the wrong gradient passes, and the right one fails",
        source="a difference test of the raw forward (G2)",
        clauses=("D5", "G2"),
        keep="stack/bound/differences/none-w1/uneven-last/float64-float64/plain",
        kills=(("gradient", "lora_A"), ("gradient", "lora_B")),
        subject="differences",
    ),
    Bug(
        name="NormOfOwnFactor",
        bug="takes local norms from its own rows of A, where the whole of A is meant",
        effect="every rank has other norms, of a smaller update",
        source="hand-made sharding (S4)",
        clauses=("S4",),
        keep="stack/lattice/jax/shard-map-w2/uneven/float32-float32/plain",
        kills=(("gradient", "magnitude"), ("gradient", "lora_B"), ("output", "y")),
        subject="jax",
    ),
    Bug(
        name="RootBeforeTheSum",
        bug="takes the root of each tensor rank's squares, and adds the roots",
        effect="norms of cut rows are too large, by up to the root of the ranks",
        source="a norm for each part of a row (S10)",
        clauses=("S10",),
        keep="stack/lattice/jax-mesh/mesh-1x1x2-w2/uneven/float32-float32/plain",
        kills=(("gradient", "magnitude"), ("gradient", "lora_B"), ("output", "y")),
        subject="jax-mesh",
    ),
    Bug(
        name="OtherCodebookTaken",
        bug="takes any table of sixteen numbers for NF4's",
        effect="weights that are 0.45 % off, and nothing says so",
        source="torchao's table of four decimals (Q8)",
        clauses=("Q8",),
        keep="stack/refusal/jax-files/none-w1/uneven/nf4-float32/other-codebook",
        kills=(("refusal", "other-codebook"),),
        subject="jax-files",
    ),
)
