"""Run by ranks: train a little, save, load; what a rank holds as ranges of flattened tensors."""

from multiprocessing.connection import Connection
from pathlib import Path

import llama
import onehot
import torch
from torch import Tensor, distributed, nn

from torch_impl import ShardConfig, local_shards, shard_model
from torch_impl.files import checkpoint
from torch_impl.files import checkpoint_disk as checkpoint_files
from torch_impl.sharding.local_shards import gathered

Held = dict[str, tuple[int, list[float]]]
"""Start and values of this rank's range of each trained tensor and optimizer state."""


def _model(strategy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small sharded Llama and AdamW."""
    size = 2 if strategy == "fsdp2-tp" else None
    model = shard_model(llama.build("f32"), ShardConfig(strategy=strategy, tensor_size=size))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(parameters, lr=0.01)


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Held:
    """Ranges of the row-major flattening, whatever the strategy."""
    found: Held = {}
    for shard in local_shards(model, optimizer):
        if shard.kind == "gradient" or shard.name.rpartition(".")[2] not in ("lora_A", "lora_B", "magnitude"):
            continue
        if shard.tensor.dim() > 1 and shard.tensor.shape[1:] != shard.global_shape[1:]:  # tensor ranks share rows
            found[f"{shard.kind}/{shard.name}"] = (0, gathered(shard).flatten().tolist())
            continue
        rows = len(shard.index) == len(shard.global_shape) and len(shard.index) > 1
        start = shard.index[0].start * (shard.global_shape[1] if rows else 1)
        if shard.tensor.numel():
            found[f"{shard.kind}/{shard.name}"] = (start, shard.tensor.reshape(-1).tolist())
    return found


def train_and_save(*, rank: int, world: int, strategy: str, folder: str) -> Held:
    """Two steps, then a checkpoint."""
    model, optimizer = _model(strategy)
    for step in range(2):
        owner = {"tp": 0, "fsdp2-tp": rank // 2}.get(strategy, rank)
        llama.loss_of(model, step=step, owner=owner + world).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(Path(folder), model, optimizer, checkpoint.Saved(2, 8, {}))
    return _held(model, optimizer)


@torch.no_grad()
def load_and_save(*, rank: int, world: int, strategy: str, folder: str, onto: str) -> Held:
    """Load the newest under `folder` over other values, and save it again under `onto`."""
    model, optimizer = _model(strategy)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(float(rank + world))
    saved = checkpoint.load_(checkpoint_files.newest(Path(folder)), model, optimizer)
    checkpoint.save(Path(onto), model, optimizer, saved)
    return _held(model, optimizer)


def draws(*, rank: int, world: int, folder: str) -> list[float]:
    """The next random numbers after a load at this world size."""
    model, optimizer = _model("fsdp2")
    torch.manual_seed(1000 * world + rank)
    checkpoint.load_(checkpoint_files.newest(Path(folder)), model, optimizer)
    return torch.rand(3).tolist()


def draws_saved(*, rank: int, world: int, folder: str) -> list[float]:
    """Save with a generator of this rank's own; its next random numbers."""
    model, optimizer = _model("fsdp2")
    torch.manual_seed(rank + 17 * world)
    checkpoint.save(Path(folder), model, optimizer, checkpoint.Saved(0, 0, {}))
    return torch.rand(3).tolist()


def whole(parts: list[Held]) -> dict[str, Tensor]:
    """Every rank's ranges, put together; NaN where no rank has any."""
    found: dict[str, Tensor] = {}
    for name in sorted({name for part in parts for name in part}):
        ranges = [part[name] for part in parts if name in part]
        flat = torch.full((max(start + len(values) for start, values in ranges),), torch.nan)
        for start, values in ranges:
            flat[start : start + len(values)] = torch.tensor(values)
        found[name] = flat
    return found


def save_for_ever(rank: int, store: str, folder: Path, pipe: Connection) -> None:
    """A rank that trains nothing and saves all the time; every element of step n is n."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = shard_model(onehot.build(onehot.Stack()), ShardConfig(strategy="fsdp2"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 10**6):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(step)
        checkpoint.save(folder, model, optimizer, checkpoint.Saved(step, 0, {}))
        pipe.send(step)
