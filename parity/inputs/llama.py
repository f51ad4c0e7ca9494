"""A Llama of one block: its linear layers, embedding and head are the layers of a stack, by Hugging Face's names."""

from __future__ import annotations

import numpy as np

from parity.case import CheckpointCase
from parity.inputs import stack_inputs

_ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
_MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
LINEARS = tuple(f"model.layers.0.{name}.weight" for name in _ATTENTION + _MLP)
"""What bitsandbytes packs, in the order of the case's layers."""
LEFT = ("model.embed_tokens.weight", "lm_head.weight")
"""What it leaves as it is: the layers after those."""


def llama_weights(case: CheckpointCase) -> dict[str, np.ndarray]:
    """Every weight but the norms', `(out, in)`, which stay at one."""
    arrays = stack_inputs(case)
    return {name: arrays[f"layers.{position}.weight"] for position, name in enumerate(LINEARS + LEFT)}


def llama_sizes(case: CheckpointCase) -> dict[str, int]:
    """What transformers' configuration wants to know; keys and values have one head."""
    (width, queries), (_, keys), *_ = case.layers
    return {
        "hidden_size": width,
        "intermediate_size": case.layers[LINEARS.index("model.layers.0.mlp.up_proj.weight")][1],
        "num_attention_heads": queries // keys,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": case.layers[-1][1],
    }
