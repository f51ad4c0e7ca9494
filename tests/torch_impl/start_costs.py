"""Run as a command, `start_costs.py MODEL`: the memory that loading SmolLM2 in NF4 takes, as JSON on the last line.

Bytes over the skeleton while the model is loaded; the loaded model's; its largest tensor's.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from torch_impl import DoraConfig, apply_dora
from torch_impl.files.materialize import materialize, skeleton
from torch_impl.memory import host_memory


def memory(model: Path) -> dict[str, int]:
    """Load NF4 with adapters, once."""
    skeleton(model, dtype=None)
    warm = Linear4bit(256, 256, quant_type="nf4").to("cpu")  # bitsandbytes loads its library
    apply_dora(nn.Sequential(warm), DoraConfig(rank=8, alpha=16))
    before = host_memory(peak=True)
    loaded = materialize(model, DoraConfig(rank=8, alpha=16, quant="nf4"))
    held = {id(t): t.nbytes for t in [*loaded.parameters(), *loaded.buffers()]}
    return {"over": host_memory(peak=True) - before, "model": sum(held.values()), "largest": max(held.values())}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(memory(Path(sys.argv[1]))))  # noqa: T201 - the answer
