"""A tiny Llama whose blocks are compiled, and the one-hot proof on it, run by ranks."""

from typing import Any

import torch
from kinds_onehot import moved
from onehot import Evidence, _compare
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_impl import DoraConfig, ShardConfig, apply_dora, compile_blocks, shard_model
from torch_impl.errors import ShardingError
from torch_impl.files.materialize import recompute_activations

VOCABULARY, LENGTH = 48, 6
EXACT = "aot_eager"
"""Traces and partitions as inductor does, and runs torch's own kernels."""


def build(
    *, backend: str = "", dtype: torch.dtype = torch.float32, recompute: bool = False, **config: object
) -> nn.Module:
    """The same adapted model on every rank, compiled where a backend is named."""
    torch.manual_seed(5)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype).train()
    apply_dora(model, DoraConfig(**({"rank": 2, "alpha": 3, "target_modules": ["q_proj", "down_proj"]} | config)))
    moved(model)
    if recompute:
        recompute_activations(model)
    return compile_blocks(model, backend=backend) if backend else model


def step(model: nn.Module, *, owner: int, scale: float) -> None:
    """The gradients of one rank's batch."""
    generator = torch.Generator().manual_seed(owner)
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator)
    G: Tensor = torch.randn((1, LENGTH, VOCABULARY), generator=generator)
    torch.manual_seed(owner)  # dropout's masks
    model.zero_grad()
    (model(ids).logits.float() * G * scale).sum().backward()


def run(*, rank: int, world: int, backend: str, config: dict[str, Any], **shard: Any) -> Evidence:
    """One-hot steps of the compiled model, sharded, against the compiled one, unsharded."""
    torch._dynamo.reset()
    whole = build(backend=backend, **config)
    sharded = shard_model(build(backend=backend, **config), ShardConfig(**shard))
    pair = (whole, sharded)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in pair]
    evidence = Evidence()
    for hot in range(world):
        step(whole, owner=hot, scale=1 / world)
        step(sharded, owner=rank, scale=float(rank == hot))
        _compare(evidence, whole, sharded, optimizers, kinds=("gradient", "parameter"))
        for optimizer in optimizers:
            optimizer.step()
        _compare(evidence, whole, sharded, optimizers, kinds=("parameter", "optimizer:momentum_buffer"))
    return evidence


def refusal(*, rank: int, world: int, late: bool = False, **shard: Any) -> str:
    """What is said of compiled blocks in these units, or of blocks that are compiled too late."""
    del rank, world
    model = build() if late else build(backend=EXACT)
    try:
        sharded = shard_model(model, ShardConfig(**shard))
        compile_blocks(sharded)
    except ShardingError as error:
        return f"{error} {error.hint}"
    return ""
