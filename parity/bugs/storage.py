"""Bugs of four-bit storage."""

from __future__ import annotations

from parity.bugs.record import GRADIENTS, Bug, Signature

STORAGE = (
    Bug(
        name="NibbleSwap",
        bug="packs element 0 in the low nibble",
        effect="neighbours change places",
        source="ports of NF4",
        clauses=("Q3",),
        keep="codec and uneven/nf4-float32/plain",
        kills=(("packed", "weight"), ("decoded", "weight")),
        signature=Signature.CODES,
    ),
    Bug(
        name="Nf4TieUp",
        bug="rounds a tie to the upper code",
        effect="bytes differ at midpoints",
        source="ports of NF4",
        clauses=("Q5",),
        keep="codec and ties",
        kills=(("packed", "weight"), ("decoded", "weight")),
        signature=Signature.CODES,
    ),
    Bug(
        name="BlocksByRow",
        bug="begins a block anew with each row",
        effect="where blocks run across rows, weights have another block's scale",
        source="bitsandbytes 0.50's CPU decoder with AVX-512",
        clauses=("Q1", "Q4"),
        keep="checkpoint/files/torch_impl/none-w1/llama/nf4-float32/written",
        kills=(("decoded", "weight"),),
    ),
    Bug(
        name="NestedOffsetForgotten",
        bug="leaves out the mean that nested scales were shifted by",
        effect="every weight is scaled by what is left, some hundredths",
        source="ports of nested quantisation",
        clauses=("Q6", "Q4", "C2"),
        keep="(codec or checkpoint/files) and torch_impl and none-w1 and nf4-float32 and not flat and not storage",
        kills=(("decoded", "weight"),),
    ),
    Bug(
        name="OtherCode",
        bug="derives the NF4 values instead of taking the table",
        effect="weights differ in their last bit",
        source="ports of NF4",
        clauses=("Q2", "Q4"),
        keep="codec and uneven/nf4-float32/plain",
        kills=(("decoded", "weight"),),
    ),
    Bug(
        name="NotANumberTaken",
        bug="packs a weight that is not finite",
        effect="the block decodes to numbers that nobody trained",
        source="bitsandbytes' encoder, which refuses nothing",
        clauses=("Q7",),
        keep="nan-weight and torch_impl or infinite-weight and torch_impl",
        kills=(("refusal", "nan-weight"), ("refusal", "infinite-weight")),
    ),
    Bug(
        name="StorageCast",
        bug="casts packed bytes to another 16-bit dtype on the wire",
        effect="finite garbage, no warning",
        source="bitsandbytes#1945",
        clauses=("S6",),
        keep="stack/one-hot and fsdp2-w2/uneven/nf4-float32 and recompute and units-layer",
        kills=GRADIENTS,
    ),
)
