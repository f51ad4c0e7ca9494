"""SmolLM2-135M, an adapter on every linear layer of its blocks, 256 tokens of real text: whole training steps."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import peft
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from parity.bench.measure import Row, compare, take_turns
from parity.models.pretrained import locate, token_ids
from torch_impl import DoraConfig
from torch_impl.files.materialize import materialize

TOKENS, RANK, ROUNDS = 256, 16, 7
METHODS = {"lora": ("lora", None), "dora": ("dora", None), "qlora": ("lora", "nf4"), "qdora": ("dora", "nf4")}
"""Name of the method: what is trained, and how the base is stored."""
LIMITS = (
    ("smollm2-dora/lora", "ours dora", "ours lora", 1.20),
    ("smollm2-dora/peft", "ours dora", "peft dora", 0.80),
    ("smollm2-qdora/qlora", "ours qdora", "ours qlora", 1.20),
    ("smollm2-qdora/peft", "ours qdora", "peft qdora", 0.80),
    ("smollm2-lora/peft", "ours lora", "peft lora", 1.00),
    ("smollm2-qlora/peft", "ours qlora", "peft qlora", 1.00),
)
MAKERS: dict[str, Callable[[Path, str], nn.Module]]


def rows() -> Iterator[Row]:
    """DoRA and QDoRA against our LoRA and QLoRA, and all four against peft's."""
    torch.set_num_threads(1)
    model = locate(None)
    ids = torch.as_tensor(token_ids(model, TOKENS)).reshape(1, TOKENS)
    contenders = {f"{who} {method}": step(MAKERS[who](model, method), ids) for who, method in product(MAKERS, METHODS)}
    seconds = take_turns(contenders, rounds=ROUNDS)
    for name, ours_, peer, limit in LIMITS:
        yield compare(name, seconds, ours=ours_, peer=peer, limit=limit)


def ours(model: Path, method: str) -> nn.Module:
    """This project's network with its adapters."""
    kind, quant = METHODS[method]
    return materialize(model, DoraConfig(rank=RANK, alpha=2 * RANK, method=kind, quant=quant), dtype=torch.float32)


def peers(model: Path, method: str) -> nn.Module:
    """The same from peft, on the same weights."""
    kind, quant = METHODS[method]
    base = in_four_bits(model) if quant else materialize(model, None, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=kind == "dora")
    return peft.get_peft_model(base, config)


MAKERS = {"ours": ours, "peft": peers}


def in_four_bits(model: Path) -> nn.Module:
    """The plain network in float32 with every linear layer of its blocks packed, as bitsandbytes has it."""
    loaded = materialize(model, None, dtype=torch.float32)
    for name, module in list(loaded.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.load_state_dict({"weight": module.weight.data})
            parent, _, leaf = name.rpartition(".")
            setattr(loaded.get_submodule(parent), leaf, packed.to("cpu"))
    return loaded


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """A training step: forward, loss, backward and AdamW."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return run
