"""Run by ranks: the one-hot proof (link 2) on one model that holds a layer of every kind, dropout included."""

from typing import Any

import torch
from onehot import Evidence, _compare
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torch_impl import DoraConfig, ShardConfig, apply_dora, local_shards, save_adapter, shard_model

TOKENS, LENGTH = 11, 6
TARGETS = ("embed", "narrow", "picture", "volume", "wide", "head")


class EveryKind(nn.Module):
    """Ids to numbers, by way of an embedding, convolutions in one to three dimensions, a Conv1D and a linear layer."""

    def __init__(self, *, as_peft: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8, padding_idx=2)
        self.narrow = nn.Conv1d(8, 6, 3, padding="same", groups=1 if as_peft else 2)
        mode = "zeros" if as_peft else "circular"
        self.picture = nn.Conv2d(1, 3, (3, 2), padding=1, padding_mode=mode, bias=False)
        self.volume = nn.Conv3d(3, 2, (1, 2, 1), stride=(1, 2, 1))
        self.wide = Conv1D(9, 7)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """(S, LENGTH) to (S, 2, 3, 5)."""
        x = self.narrow(self.embed(ids).transpose(1, 2))
        x = self.picture(x[:, None])
        x = self.volume(x[:, :, None])[:, :, 0]
        return self.head(self.norm(torch.tanh(self.wide(x))))


def plain(*, as_peft: bool = False) -> EveryKind:
    """The model below the adapters; `as_peft` has convolutions that peft adapts likewise."""
    torch.manual_seed(5)
    return EveryKind(as_peft=as_peft)


def build(*, dtype: torch.dtype = torch.float32, as_peft: bool = False, **config: object) -> nn.Module:
    """The same adapted model on every rank, with A and B off zero and magnitudes off their start."""
    settings = {"rank": 2, "alpha": 3, "target_modules": TARGETS} | config
    model = apply_dora(plain(as_peft=as_peft).to(dtype), DoraConfig(**settings))
    return moved(model)


def moved(model: nn.Module) -> nn.Module:
    """The model with every adapter off its start, peft's too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model


def batch(model: nn.Module, *, step: int, owner: int) -> tuple[Tensor, Tensor]:
    """Ids and the cotangent of one rank at one step."""
    generator = torch.Generator().manual_seed(1000 * step + owner)
    ids = torch.randint(0, TOKENS, (3, LENGTH), generator=generator)
    with torch.no_grad():
        shape = model(ids).shape
    return ids, torch.randn(shape, generator=generator)


def run(*, rank: int, world: int, strategy: str, config: dict[str, Any]) -> dict[str, Any]:
    """One-hot steps with each rank hot in turn: gradients, momenta and parameters against the unsharded ones."""
    whole, sharded = build(**config), shard_model(build(**config), ShardConfig(strategy=strategy))
    pair = (whole, sharded)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in pair]
    evidence, found = Evidence(), []
    for step in range(2 * world):
        hot = step % world
        for model, owner, scale in ((whole, hot, 1 / world), (sharded, rank, float(rank == hot))):
            ids, G = batch(whole, step=step, owner=owner)
            torch.manual_seed(100 * step + owner)  # dropout's masks
            model.zero_grad()
            (model(ids).float() * G * scale).sum().backward()
        _compare(evidence, whole, sharded, optimizers, kinds=("gradient", "parameter"))
        for optimizer in optimizers:
            optimizer.step()
        _compare(evidence, whole, sharded, optimizers, kinds=("parameter", "optimizer:momentum_buffer"))
        found = sorted({s.name for s in local_shards(sharded) if s.kind == "gradient"})
    held = {s.name: s.tensor.numel() for s in local_shards(sharded) if s.kind == "parameter"}
    return {"evidence": evidence, "gradients": found, "held": held}


def save(*, rank: int, world: int, strategy: str, folder: str) -> None:
    """Every rank saves the sharded adapter."""
    del rank, world
    save_adapter(shard_model(build(), ShardConfig(strategy=strategy)), folder)
