"""Training steps on the device: DoRA beside LoRA, dense and packed, one layer and a network; no limit is put on them.

Times are of the device's events. Where there is no file of pretrained weights the network has its shape, drawn at
random: a step takes as long.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from parity.bench.measure import Row, compare, take_turns
from parity.gpu.finding import Finding
from parity.models.pretrained import PretrainedUnavailable, locate
from torch_impl import DoraConfig, apply_dora
from torch_impl.files.materialize import materialize

METHODS = {"lora": ("lora", None), "dora": ("dora", None), "qlora": ("lora", "nf4"), "qdora": ("dora", "nf4")}
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "use_cache": False,
}  # fmt: skip
RANK, ROUNDS, WARMUPS = 16, 9, 3
SIZES = {"cuda": (4096, 4096, 30, 2048), "cpu": (256, 16, 1, 8)}
"""Features and tokens of the layer, blocks and tokens of the network: on a CPU, enough to see that it runs."""


def findings(device: str, keep: str) -> Iterator[Finding]:
    """Each pair takes turns, in float32 and in bfloat16."""
    features, tokens, blocks, length = SIZES[device]
    model, origin = network(blocks, pretrained=device == "cuda")
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        named = {f"bench/linear-{features}/{word}": (nn.Sequential(nn.Linear(features, features, bias=False)), x)}
        named[f"bench/network-{blocks}-{origin}/{word}"] = (model, ids)
        for name, (base, inputs) in named.items():
            if keep in name:
                given = inputs.to(dtype) if inputs.is_floating_point() else inputs
                yield from _shown(name, base.to(dtype), given, device)


def network(blocks: int, *, pretrained: bool) -> tuple[nn.Module, str]:
    """SmolLM2-135M, pretrained where its file is there, or so many of its blocks at random; and which it is."""
    if pretrained:
        with contextlib.suppress(PretrainedUnavailable):
            return materialize(locate(None, fetch=False), None, dtype=torch.float32), "pretrained"
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2 | {"num_hidden_layers": blocks})), "random"


def _shown(name: str, base: nn.Module, inputs: torch.Tensor, device: str) -> Iterator[Finding]:
    steps = {method: step(adapted(base, method).to(device), inputs) for method in METHODS}
    seconds = take_turns(steps, rounds=ROUNDS, warmups=WARMUPS, clock=clock(device))
    for ours, peer in (("dora", "lora"), ("qdora", "qlora")):
        row: Row = compare(name, seconds, ours=ours, peer=peer, limit=float("inf"))
        said = f"{row.ratio:.3f}: {1e3 * row.ours_s:.2f} and {1e3 * row.peer_s:.2f} ms a step"
        yield Finding(f"{name}/{ours}-{peer}", "shown", said)


def adapted(base: nn.Module, method: str) -> nn.Module:
    """A copy with adapters on every linear layer."""
    kind, quant = METHODS[method]
    target = ["0"] if isinstance(base, nn.Sequential) else "all-linear"
    config = DoraConfig(rank=RANK, alpha=2 * RANK, method=kind, quant=quant, target_modules=target)
    return apply_dora(copy.deepcopy(base), config).train()


def step(model: nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    """Forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        if inputs.is_floating_point():
            model(inputs).square().mean().backward()
        else:
            model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()

    return run


def clock(device: str) -> Callable[[], float]:
    """Seconds; on a GPU those between events of its stream, when all before them is done."""
    if device == "cpu":
        return time.perf_counter
    began = torch.cuda.Event(enable_timing=True)
    began.record()

    def read() -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return began.elapsed_time(now) / 1000

    return read
