"""Run as a command: what preparing SmolLM2 costs, as JSON on the last line: `start_costs.py MEASURE MODEL`.

memory   bytes over the skeleton while an NF4 model is loaded; the loaded model's; its largest tensor's
times    seconds for QLoRA, QDoRA and peft's DoRA on NF4, in turn, three times each
"""

import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from torch_impl import DoraConfig, apply_dora
from torch_impl.materialize import materialize, skeleton


def peak() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(model: Path) -> dict[str, int]:
    """Load NF4 with adapters, once."""
    skeleton(model, dtype=None)
    warm = Linear4bit(256, 256, quant_type="nf4").to("cpu")  # bitsandbytes loads its library
    apply_dora(nn.Sequential(warm), DoraConfig(rank=8, alpha=16))
    before = peak()
    loaded = materialize(model, DoraConfig(rank=8, alpha=16, quant="nf4"))
    held = {id(t): t.nbytes for t in [*loaded.parameters(), *loaded.buffers()]}
    return {"over": peak() - before, "model": sum(held.values()), "largest": max(held.values())}


def in_four_bits(model: Path) -> nn.Module:
    """The plain model with every linear layer of its blocks packed, as bitsandbytes has it."""
    loaded = materialize(model, None)
    for name, module in list(loaded.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.load_state_dict({"weight": module.weight.data})
            parent, _, leaf = name.rpartition(".")
            setattr(loaded.get_submodule(parent), leaf, packed.to("cpu"))
    return loaded


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(model: Path) -> dict[str, float]:
    """Medians: the whole start for QLoRA and QDoRA, and adding DoRA to an NF4 model that is there already."""
    found: dict[str, list[float]] = {"qlora": [], "qdora": [], "add_ours": [], "add_peft": []}
    for _ in range(3):
        for name, method in (("qlora", "lora"), ("qdora", "dora")):
            config = DoraConfig(rank=8, alpha=16, quant="nf4", method=method)
            found[name].append(seconds(lambda config=config: materialize(model, config)))
        ours, theirs = in_four_bits(model), in_four_bits(model)
        found["add_ours"].append(seconds(lambda ours=ours: apply_dora(ours, DoraConfig(rank=8, alpha=16))))
        config = peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
        found["add_peft"].append(seconds(lambda theirs=theirs, config=config: peft.get_peft_model(theirs, config)))
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measure = {"memory": memory, "times": times}[sys.argv[1]]
    print(json.dumps(measure(Path(sys.argv[2]))))  # noqa: T201 - the answer
