"""Run by ranks: a small Llama (tied embeddings, grouped-query attention) trained one-hot under a strategy."""

import torch
from onehot import Evidence, _compare
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from torch_impl import DoraConfig, QuantConfig, ShardConfig, apply_dora, local_shards, shard_model


def build(kind: str) -> nn.Module:
    """The same network on every rank: `f32`, `bf16` or `nf4` (packed in bf16 from a float32 model)."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if kind.endswith("bf16") else torch.float32)
    compute_dtype = torch.bfloat16 if kind == "f32-bf16-compute" else None
    quant = QuantConfig() if kind.startswith("nf4") else None
    model = apply_dora(model, DoraConfig(rank=3, alpha=6, quant=quant, compute_dtype=compute_dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    return model


def loss_of(model: nn.Module, *, step: int, owner: int) -> torch.Tensor:
    """Next-token cross entropy on one rank's text."""
    tokens = torch.randint(0, 67, (2, 13), generator=torch.Generator().manual_seed(100 * step + owner))
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def run(*, rank: int, world: int, strategy: str, kind: str) -> Evidence:
    """One step with each rank hot in turn; gradients, then parameters, against the unsharded network over the world."""
    whole, sharded = build(kind), shard_model(build(kind), ShardConfig(strategy=strategy))
    trainable = [[p for p in m.parameters() if p.requires_grad] for m in (whole, sharded)]
    optimizers = [torch.optim.SGD(parameters, lr=0.1, momentum=0.9) for parameters in trainable]
    evidence = Evidence()
    for hot in range(world):
        whole.zero_grad()
        loss_of(whole, step=hot, owner=hot).backward()
        for parameter in trainable[0]:
            parameter.grad /= world
        sharded.zero_grad()
        (loss_of(sharded, step=hot, owner=rank) * float(rank == hot)).backward()
        _compare(evidence, whole, sharded, optimizers, kinds=("gradient",))
        for optimizer in optimizers:
            optimizer.step()
        _compare(evidence, whole, sharded, optimizers, kinds=("parameter", "optimizer:momentum_buffer"))
    return evidence


def trains_with_param_dtype(*, rank: int, world: int, strategy: str) -> bool:
    """A float32 network, bf16 on the wire and in compute: gradients of float32 adapters, finite and not zero."""
    torch.manual_seed(11)
    model = build("f32-bf16-compute")
    model = shard_model(model, ShardConfig(strategy=strategy, param_dtype=torch.bfloat16))
    loss_of(model, step=0, owner=rank).backward()
    gradients = [s.tensor for s in local_shards(model) if s.kind == "gradient"]
    assert {g.dtype for g in gradients} == {torch.float32}
    return all(bool(torch.isfinite(g).all()) for g in gradients) and any(bool(g.any()) for g in gradients) and world > 1
