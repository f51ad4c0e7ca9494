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
)
