"""Tiny mixtures of experts as transformers has them, and the one-hot proof on them, run by ranks."""

from typing import Any

import torch
import transformers
from kinds_onehot import moved
from onehot import Evidence, _compare
from torch import Tensor, nn

from torch_impl import DoraConfig, ShardConfig, apply_dora, local_shards, save_adapter, shard_model

VOCABULARY, LENGTH = 48, 6
STACKS = ("gate_up_proj", "down_proj")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2, "head_dim": 8,
    "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 5, "moe_intermediate_size": 24}),
    "gpt-oss": ("GptOss", {"num_local_experts": 5}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 6, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 0,
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "num_key_value_heads": 2, "n_shared_experts": 1, "head_dim": 4,
        },
    ),
}  # fmt: skip
"""A class of transformers, and its own sizes; gpt-oss stores (E, I, O) and has biases."""


def plain(name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model below the adapters; five experts, so that shards are uneven."""
    prefix, own = MIXTURES[name]
    torch.manual_seed(5)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**(SIZES | own)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 3 or "bias" in parameter_name:
                parameter.normal_(std=0.3)
    return model.to(dtype)


def build(name: str, *, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    """The same adapted model on every rank, with A and B off zero and magnitudes off their start."""
    settings = {"rank": 2, "alpha": 3, "target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS} | config
    model = apply_dora(plain(name, dtype=dtype), DoraConfig(**settings))
    torch.manual_seed(6)
    return moved(model)


def batch(*, step: int, owner: int) -> tuple[Tensor, Tensor]:
    """Ids and the logits' cotangent of one rank at one step; one sequence, so that some experts have no token."""
    generator = torch.Generator().manual_seed(1000 * step + owner)
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator)
    return ids, torch.randn((1, LENGTH, VOCABULARY), generator=generator)


def run(*, rank: int, world: int, name: str, config: dict[str, Any], **shard: Any) -> dict[str, Any]:
    """One-hot steps with each rank hot in turn: gradients, momenta and parameters against the unsharded ones."""
    whole, sharded = build(name, **config), shard_model(build(name, **config), ShardConfig(**shard))
    pair = (whole, sharded)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in pair]
    evidence = Evidence()
    for step in range(2 * world):
        hot = step % world
        for model, owner, scale in ((whole, hot, 1 / world), (sharded, rank, float(rank == hot))):
            ids, G = batch(step=step, owner=owner)
            torch.manual_seed(100 * step + owner)  # dropout's masks
            model.zero_grad()
            (model(ids).logits.float() * G * scale).sum().backward()
        _compare(evidence, whole, sharded, optimizers, kinds=("gradient", "parameter"))
        for optimizer in optimizers:
            optimizer.step()
        _compare(evidence, whole, sharded, optimizers, kinds=("parameter", "optimizer:momentum_buffer"))
    held = {s.name: s.tensor.numel() for s in local_shards(sharded) if s.kind == "parameter"}
    return {"evidence": evidence, "held": held}


def save(*, rank: int, world: int, name: str, strategy: str, folder: str) -> None:
    """Every rank saves the sharded adapter."""
    del rank, world
    save_adapter(shard_model(build(name), ShardConfig(strategy=strategy)), folder)
