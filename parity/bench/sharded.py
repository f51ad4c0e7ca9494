"""SmolLM2-135M on two ranks: whole training steps of models cut by blocks, in turns on the wall's clock.

peft's network is cut as its users cut it, `fully_shard` around each block and then around the model; ours by
`shard_model`. Each rank has 128 tokens and one thread. A turn begins and ends with both ranks. Unsharded, one of them
has all 256 tokens while the other waits: what the gathers and their copies cost is what two processors don't gain.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from parity.bench.child import end_with_parent
from parity.bench.measure import Row, Seconds, compare, take_turns
from parity.bench.network import MAKERS, step
from parity.implementations.torch_training import CollectiveCounter
from parity.models.pretrained import locate, token_ids
from torch_impl import ShardConfig, shard_model

WORLD, ROUNDS = 2, 5
SEQUENCES, LENGTH = 1, 128
SECONDS = 900
"""How long the two ranks may take."""
SHARDED = ("ours dora", "ours lora", "ours qdora", "peft dora", "peft qdora")
WHOLE = ("ours dora", "ours lora")
"""Unsharded on the first rank alone, with the tokens of both."""
ALLOWED = 0.04
"""By how much more of LoRA's step DoRA's may take where both are sharded."""


def rows() -> Iterator[Row]:
    """What the first rank says, as it says it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        words = [sys.executable, "-m", __name__, folder]
        other = subprocess.Popen([*words, "1"], stdout=subprocess.DEVNULL)  # noqa: S603 - ourselves
        try:
            first = subprocess.run([*words, "0"], check=False, stdout=subprocess.PIPE, text=True, timeout=SECONDS)  # noqa: S603
        finally:
            other.kill()
            other.wait()
        if first.returncode:  # its last line is the reason
            sys.exit(first.returncode)
        for line in first.stdout.splitlines():
            yield Row(**json.loads(line))


def measured() -> Iterator[Row]:
    """Every row, on each rank; the clock is the same for all, since a turn ends with the last one."""
    model = locate(None)
    text = torch.as_tensor(token_ids(model, SEQUENCES * LENGTH))
    batches = [text.roll(rank).reshape(SEQUENCES, LENGTH) for rank in range(WORLD)]
    mine, all_of_them = batches[distributed.get_rank()], torch.cat(batches)
    steps = {name: _sharded(name, model, mine) for name in SHARDED}
    for name in WHOLE if distributed.get_rank() == 0 else ():
        steps[f"whole {name}"] = step(_made(name, model), all_of_them)
    steps |= {f"whole {name}": _nothing for name in WHOLE if f"whole {name}" not in steps}
    yield _collectives("sharded-collectives/block", steps["ours dora"], blocks=_blocks(model))
    seconds = take_turns({name: _together(run) for name, run in steps.items()}, rounds=ROUNDS, clock=time.perf_counter)
    yield from _rows(seconds)


def _rows(seconds: Seconds) -> Iterator[Row]:
    yield compare("sharded-dora/peft", seconds, ours="ours dora", peer="peft dora", limit=0.85)
    yield compare("sharded-qdora/peft", seconds, ours="ours qdora", peer="peft qdora", limit=0.80)
    whole = compare("", seconds, ours="whole ours dora", peer="whole ours lora", limit=0)
    limit = whole.ratio + ALLOWED
    yield compare("sharded-dora/lora", seconds, ours="ours dora", peer="ours lora", limit=limit)
    yield compare("sharded-dora/unsharded", seconds, ours="ours dora", peer="whole ours dora", limit=1.30)


def _sharded(name: str, model: Path, ids: torch.Tensor) -> Callable[[], None]:
    made = _made(name, model)
    if name.startswith("ours"):
        return step(shard_model(made, ShardConfig("fsdp2")), ids)
    for block in made.get_submodule("base_model.model.model.layers").children():
        fully_shard(block)
    return step(fully_shard(made), ids)


def _made(name: str, model: Path) -> nn.Module:
    who, method = name.split()
    return MAKERS[who](model, method)


def _blocks(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


def _nothing() -> None:
    """What the other rank does meanwhile."""


def _together(run: Callable[[], None]) -> Callable[[], None]:
    """A turn of both ranks."""

    def turn() -> None:
        run()
        distributed.barrier()

    return turn


def _collectives(name: str, run: Callable[[], None], *, blocks: int) -> Row:
    """Collectives of a block in one step; the root's one gather is no block's."""
    run()
    with CollectiveCounter() as counter:
        run()
    of_blocks = float(counter.counts.sum()) - 1
    return Row(name, of_blocks, blocks, of_blocks / blocks, limit=3.0, unit="")


def main(folder: str, rank: int) -> None:
    """Measure as this rank; the first one prints."""
    end_with_parent()
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    for row in measured():
        sent = {key: value for key, value in row.as_json().items() if key != "holds"}
        print(json.dumps(sent), flush=True)  # noqa: T201 - the answer
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
