"""One layer, 4096 x 4096, rank 16, float32, 512 tokens: forward, backward and an AdamW step."""

import copy
from collections.abc import Callable, Iterator
from typing import Literal

import peft
import torch
from torch import nn

from parity.bench.measure import Row, compare, take_turns
from torch_impl import DoraConfig, apply_dora

FEATURES, TOKENS, RANK, ROUNDS = 4096, 512, 16, 9
Method = Literal["lora", "dora"]


def rows() -> Iterator[Row]:
    """`linear-dora/lora` and `linear-dora/peft`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False))
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    cotangent = torch.randn(TOKENS, FEATURES)
    models = {"lora": ours(base, "lora"), "dora": ours(base, "dora"), "peft": peers(base, "dora")}
    seconds = take_turns({name: step(model, x, cotangent) for name, model in models.items()}, rounds=ROUNDS, warmups=2)
    yield compare("linear-dora/lora", seconds, ours="dora", peer="lora", limit=1.10)
    yield compare("linear-dora/peft", seconds, ours="dora", peer="peft", limit=0.65)


def ours(base: nn.Module, method: Method) -> nn.Module:
    """This project's adapter on a copy of the layer."""
    return apply_dora(copy.deepcopy(base), DoraConfig(rank=RANK, alpha=2 * RANK, target_modules=["0"], method=method))


def peers(base: nn.Module, method: Method) -> nn.Module:
    """The same from peft."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], use_dora=method == "dora")
    return peft.get_peft_model(copy.deepcopy(base), config)


def step(model: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> Callable[[], None]:
    """A training step, the input's gradient included, as in the middle of a network."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).backward(cotangent)
        optimizer.step()

    return run
