"""Getting SmolLM2 in NF4 ready to train: our whole start, and adding DoRA to a network that is packed already."""

from collections.abc import Iterator

import peft
import torch

from parity.bench.measure import Row, compare, take_turns
from parity.bench.network import RANK, in_four_bits
from parity.models.pretrained import locate
from torch_impl import DoraConfig, apply_dora
from torch_impl.files.materialize import materialize

ROUNDS = 3


def rows() -> Iterator[Row]:
    """`prepare-qdora/qlora` (the whole start, by the same code) and `prepare-qdora/peft` (adding DoRA alone)."""
    torch.set_num_threads(1)
    model = locate(None)

    def start(method: str) -> object:
        config = DoraConfig(rank=RANK, alpha=2 * RANK, quant="nf4", method=method)
        return materialize(model, config, dtype=torch.float32)

    starts = take_turns({"qdora": lambda: start("dora"), "qlora": lambda: start("lora")}, rounds=ROUNDS)
    yield compare("prepare-qdora/qlora", starts, ours="qdora", peer="qlora", limit=1.5)

    packed = {who: [in_four_bits(model) for _ in range(ROUNDS + 1)] for who in ("ours", "peft")}
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=True)
    additions = take_turns(
        {
            "ours": lambda: apply_dora(packed["ours"].pop(), DoraConfig(rank=RANK, alpha=2 * RANK)),
            "peft": lambda: peft.get_peft_model(packed["peft"].pop(), config),
        },
        rounds=ROUNDS,
    )
    yield compare("prepare-qdora/peft", additions, ours="ours", peer="peft", limit=1 / 3)
