"""Bugs of adapter files."""

from __future__ import annotations

from parity.bugs.record import Bug

FILES = (
    Bug(
        name="DoraSilentlyLora",
        bug="leaves the magnitudes out of what is written or read",
        effect="a trained DoRA comes back with magnitudes as at the start",
        source="axolotl#1589, unsloth-zoo#954, torchtune#2250",
        clauses=("C1",),
        keep="files and fsdp2-w4/uneven and read",
        kills=(("parameter", "magnitude"),),
    ),
    Bug(
        name="ShardSavedAsWhole",
        bug="writes one rank's part under the whole's name",
        effect="a file that loads, and holds zeros where other ranks' rows were",
        source="accelerate#4206",
        clauses=("C4",),
        keep="files and fsdp2-w4/uneven and written",
        kills=(("parameter", "lora_A"), ("parameter", "lora_B"), ("parameter", "magnitude")),
    ),
    Bug(
        name="MergedWithoutMagnitude",
        bug="merges W + s B A and leaves the magnitude out",
        effect="the merged model is that of a LoRA",
        source="exporters that know LoRA alone",
        clauses=("D10",),
        keep="stack/lattice/torch_impl/none-w1/uneven/float32-float32/merge and not bias and not zero",
        kills=(("merged", "weight"),),
    ),
    Bug(
        name="PickleRead",
        bug="unpickles what is no safetensors file",
        effect="whoever wrote the file runs what he likes",
        source="peft's adapter_model.bin",
        clauses=("C3",),
        keep="pickled-adapter",
        kills=(("refusal", "pickled-adapter"),),
    ),
)
