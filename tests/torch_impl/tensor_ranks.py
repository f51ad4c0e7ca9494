"""Run by ranks: layers whose features tensor ranks share (S10), on numbers whose every sum is exact; and refusals.

Weights, adapters and inputs are small integers, and m is 2 n, so that c is 2 whatever n rounds to: outputs and
gradients of the same model unsharded are then the only right ones, to the bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from torch_impl import DoraConfig, DoraError, QuantConfig, ShardConfig, apply_dora, local_shards, shard_model
from torch_impl.layers.cut import Cut
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.norm import weight_norm
from torch_impl.sharding.meshes import TENSOR, rank_mesh
from torch_impl.training import optim


class Block(nn.Module):
    """Two branches, whose product a third layer reads, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 24, bias=True), nn.Linear(6, 24, bias=False)
        self.down = nn.Linear(24, 6, bias=True)
        self.mixed = nn.Linear(6, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, 6) to (T, 12)."""
        return self.mixed(x + self.down(self.gate(x).relu() + self.up(x)))


PLAN = {"gate": "colwise", "up": "colwise", "down": "rowwise", "mixed": "replicate"}


def build(targets: list[str], *, seed: int = 3, **config: Any) -> nn.Module:
    """The same numbers on every rank; what isn't targeted stays plain."""
    pick = torch.Generator().manual_seed(seed)
    model = Block()
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=pick))
        model.down.bias.mul_(3)  # torch gives each of three ranks a third of a plain row's
    model = apply_dora(model, DoraConfig(rank=2, alpha=4, target_modules=targets, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=pick))
        for layer in model.modules():
            if isinstance(layer, DoraLayer) and layer.magnitude is not None:
                layer.reset_magnitude()
                layer.magnitude.mul_(2)
    return model.train()


def differing(
    *, rank: int, world: int, strategy: str, tensor: int, targets: list[str], **config: Any
) -> dict[str, Any]:
    """Outputs and gradients that differ from the unsharded model's, and how many were compared."""
    plan = {name: style for name, style in PLAN.items() if name != "mixed" or "mixed" in targets}
    twin, model = build(targets, **config), build(targets, seed=3, **config)
    size = tensor if strategy == "fsdp2-tp" else None
    model = shard_model(model, ShardConfig(strategy=strategy, tensor_size=size, tensor_plan=plan))
    batches = world // tensor
    x = torch.randint(-2, 3, (batches, 5, 6), generator=torch.Generator().manual_seed(1)).float()

    def output(net: nn.Module, own: int) -> Tensor:
        torch.manual_seed(own)  # of dropout
        return net(x[own])

    mine, hot = (
        rank // tensor,
        batches - 1,
    )  # one batch counts: sums over several are rounded once they are divided by n
    wanted = output(twin, mine)
    output(twin, hot).sum().backward()
    y = output(model, mine)
    (y.sum() * batches * (mine == hot)).backward()
    found = [] if torch.equal(y, wanted) else ["y"]
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    for shard in local_shards(model):
        if shard.kind == "gradient":
            part = gradients[shard.name][shard.index]
            found += [] if torch.equal(part, shard.tensor) and part.any() else [shard.name]
    norms = [optim.gradient_norm(model), sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5]
    return {"differing": found, "compared": len(gradients), "norms": norms}


def planned(*, rank: int, world: int) -> dict[str, str]:
    """How each layer is cut, of a model that has a plan itself."""
    del rank, world
    model = build(["gate", "up", "down"])
    model.tp_plan = {"gate": "colwise_gather_output", "up": "colwise", "down": "rowwise_split_input", "gone": "colwise"}
    model = shard_model(model, ShardConfig(strategy="tp", tensor_plan={"up": "replicate"}))
    cuts = {name: layer.cut for name, layer in model.named_modules() if isinstance(layer, DoraLayer)}
    return {name: cut.along for name, cut in cuts.items() if cut is not None}


def norms(*, rank: int, world: int, W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norms of rows that the ranks share."""
    cut = Cut("row", rank_mesh("cpu", ShardConfig(strategy="tp"))[TENSOR])
    width = W.shape[1] // world
    own = slice(rank * width, (rank + 1) * width)
    return weight_norm(W[:, own], A[:, own], B, scaling=scaling, cut=cut)


def unlike_batches(*, rank: int, world: int, later: bool) -> str:
    """What a run says in which each tensor rank sees a batch of its own: from the first step on, or `later`."""
    del world
    model = shard_model(build(["up", "down"]), ShardConfig(strategy="tp", tensor_plan=PLAN))
    optimizer = optim.make_optimizer(model, "sgd", lr=1e-6, weight_decay=0.0)
    try:
        for step in range(3):
            own = rank if step or not later else 0
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + own))
            model(x).square().sum().backward()
            optimizer.step()
    except DoraError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def parted(*, rank: int, world: int) -> str:
    """What a rank says of copies whose bits are 1, 2, 3, ...: those of a middle one are the mean of all."""
    del world
    cut = Cut("row", rank_mesh("cpu", ShardConfig(strategy="tp"))[TENSOR])
    try:
        cut.sums(torch.ones(2), alike=torch.tensor([rank + 1], dtype=torch.int32).view(torch.float32))
    except DoraError as error:
        return str(error)
    return ""


REFUSED: dict[str, tuple[str, str]] = {
    "no-plan": ("ShardingError", "tp has no plan for a Block"),
    "no-style": ("ShardingError", "tp has no style for the adapted layer mixed"),
    "matches-nothing": ("ShardingError", "tensor_plan's 'gone.*' matches nothing"),
    "unknown-style": ("ShardingError", "gate is 'diagonal' in the plan"),
    "outputs": ("ShardingError", "mixed's 12 output features don't divide among 5 tensor ranks"),
    "inputs": ("ShardingError", "mixed's 6 input features don't divide among 5 tensor ranks"),
    "plain-outputs": ("ShardingError", "gate's 24 output features don't divide among 5 tensor ranks"),
    "blocks": ("StorageError", "down: a tensor rank's 12 numbers of each row are no whole blocks of 32"),
    "kind": ("ShardingError", "mixed is a Embedding that the plan cuts colwise"),
    "trains": ("ShardingError", "mixed.weight trains, and tp knows no gradient of it"),
    "tensor-size": ("ShardingError", "tensor_size 3 for fsdp2-tp in a world of 2"),
    "part-of-the-world": ("ShardingError", "tensor_size 1 for tp in a world of 2"),
    "no-size": ("ShardingError", "fsdp2-tp with tensor_size None"),
    "no-tensor-ranks": ("ShardingError", "fsdp2 has no tensor ranks"),
    "heads": ("ShardingError", "num_key_value_heads 1 don't divide among 2 tensor ranks"),
    "conv1d": ("ShardingError", "transformer.h.0.attn.c_attn is a DoraConv1D, which tensor ranks can't share"),
    "experts": ("ShardingError", "mlp.experts.gate_up_proj is 'packed_colwise' in the plan"),
}


def _heads() -> nn.Module:
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return apply_dora(LlamaForCausalLM(config), DoraConfig(rank=2, alpha=4))


def _conv1d() -> nn.Module:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    return apply_dora(model, DoraConfig(rank=2, alpha=4, target_modules=["c_attn"]))


def _experts() -> nn.Module:
    config = MixtralConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    target = {"target_modules": (), "target_parameters": ["gate_up_proj"]}
    return apply_dora(MixtralForCausalLM(config), DoraConfig(rank=2, alpha=4, **target))


_MODELS = {"heads": _heads, "conv1d": _conv1d, "experts": _experts}


def refused(*, rank: int, world: int, name: str) -> tuple[str, str, bool]:
    """The error, and whether the model is as it was."""
    del rank, world
    targets = ["gate", "down", "mixed"] if name in ("no-style", "outputs", "inputs") else ["down"]
    config = {"quant": QuantConfig(blocksize=32)} if name == "blocks" else {}
    model = _MODELS[name]() if name in _MODELS else build(targets, **config)
    if name == "kind":
        model.mixed = nn.Embedding(3, 12)
        model.requires_grad_(False)
        model.down.lora_A.requires_grad_(True)
    if name == "trains":
        model.mixed.weight.requires_grad_(True)
    plans: dict[str, dict[str, str] | None] = {
        "no-plan": None,
        "heads": None,
        "experts": None,
        "conv1d": {"transformer.h.*.attn.c_attn": "colwise"},
        "matches-nothing": PLAN | {"gone.*": "colwise"},
        "unknown-style": PLAN | {"gate": "diagonal"},
        "kind": PLAN | {"mixed": "colwise"},
        "outputs": dict.fromkeys(PLAN, "replicate") | {"mixed": "colwise"},
        "inputs": dict.fromkeys(PLAN, "replicate") | {"mixed": "rowwise"},
    }
    plan = plans.get(name, {key: style for key, style in PLAN.items() if key != "mixed"})
    before = dict(model.named_parameters())
    sizes = {"tensor-size": ("fsdp2-tp", 3), "part-of-the-world": ("tp", 1), "no-size": ("fsdp2-tp", None)}
    strategy, size = sizes.get(name, ("fsdp2", 2) if name == "no-tensor-ranks" else ("tp", None))
    try:
        shard_model(model, ShardConfig(strategy=strategy, tensor_size=size, tensor_plan=plan))
    except DoraError as error:
        same = all(parameter is before[key] for key, parameter in model.named_parameters())
        return type(error).__name__, str(error), same
    return "", "", False
