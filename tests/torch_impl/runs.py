"""Run by ranks: whole training runs in a pool's process group, and what they leave behind."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from onehot import Stack, build
from safetensors import safe_open
from safetensors.torch import load_file

from torch_impl import ShardConfig, local_shards
from torch_impl.errors import DoraError
from torch_impl.files import checkpoint
from torch_impl.files.materialize import materialize
from torch_impl.sharding.apply import shard_model
from torch_impl.sharding.meshes import shard_size
from torch_impl.training import optim
from torch_impl.training import train as module
from torch_impl.training.options import TrainOptions
from torch_impl.training.phases import Phases


def train(*, rank: int, world: int, options: dict[str, Any], stop_after: int | None = None) -> str:
    """One run; what it refused, or nothing. After step `stop_after` the last rank pretends to have had SIGTERM."""
    phases = Phases(rank=rank, world_size=world, limit=600.0)
    if stop_after is not None and rank == world - 1:
        plain = module._one_step

        def one_step(run: module.Run) -> bool:
            phases.stop_requested_at = 1.0 if run.step >= stop_after else None
            return plain(run)

        module._one_step = one_step
    try:
        module.train(TrainOptions(**options), phases)
    except DoraError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if stop_after is not None and rank == world - 1:
            module._one_step = plain
    return ""


def said(*, rank: int, world: int, options: dict[str, Any]) -> list[str]:
    """The lines that a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        train(rank=rank, world=world, options=options)
    return lines.getvalue().splitlines()


def poisoned(*, rank: int, world: int, options: dict[str, Any], value: float) -> str:
    """A run in which the loss is multiplied by NaN or zero from its second step on, on the last rank only if NaN."""
    plain, calls = optim.cross_entropy_sum, []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        hit = len(calls) > 1 and (value == 0.0 or rank == world - 1)
        return plain(logits, labels) * (value if hit else 1.0)

    optim.cross_entropy_sum = loss
    try:
        return train(rank=rank, world=world, options=options)
    finally:
        optim.cross_entropy_sum = plain


def reloaded(*, rank: int, world: int, options: dict[str, Any], place: Path, strategy: str) -> list[str]:
    """Load a checkpoint under a strategy; the names whose ranges differ from the whole tensors in the files."""
    del world
    options = TrainOptions(**options)
    options = dataclasses.replace(options, strategy=strategy)
    torch.manual_seed(99)
    model = shard_model(materialize(options.model, options.dora), options.sharding)
    optimizer = optim.make_optimizer(model, options.optimizer, lr=1.0, weight_decay=0.0)
    saved = checkpoint.load_(place, model, optimizer)
    assert saved.step > 0
    whole = whole_tensors(place)
    wrong, seen = [], set()
    for shard in local_shards(model, optimizer):
        name = shard.name if shard.kind == "parameter" else f"{shard.kind}/{shard.name}"
        if name in whole:
            seen.add(name)
            part = checkpoint._flat(shard)
            want = whole[name][part.start : part.start + part.part.numel()]
            if not torch.equal(part.part, want):
                wrong.append(name)
    assert seen == {name for name in whole if not name.startswith("rng/")}, rank
    return wrong


def whole_tensors(place: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's flattened tensors, put together from all shard files by their offsets."""
    sizes = json.loads((place / "state.json").read_text())["tensors"]
    whole = {name: torch.full((size,), float("nan")) for name, size in sizes.items()}
    for path in place.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        for name, part in load_file(path).items():
            if name in whole:
                start = offsets[name]["saved_offsets"][0]
                whole[name][start : start + part.numel()] = part
    return whole


def norm(*, rank: int, world: int, strategy: str) -> tuple[float, float]:
    """The gradient's norm under a strategy, and that of the unsharded mean gradient."""
    whole = build(Stack())
    for other in range(world):
        torch.manual_seed(other)
        (whole(torch.randn(4, 66)).sum() / world).backward()
    model = shard_model(build(Stack()), ShardConfig(strategy=strategy))
    torch.manual_seed(rank)
    model(torch.randn(4, 66)).sum().backward()
    replicas = world // shard_size(ShardConfig(strategy=strategy), world_size=world)
    return optim.gradient_norm(model, replicas=replicas), optim.squared_norm(optim.gradients(whole)) ** 0.5


def adapter(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a run wrote as its adapter."""
    return load_file(options["out"] / "adapter" / "adapter_model.safetensors")


def values(options: dict[str, Any], name: str) -> list[float]:
    """What was recorded under a name at each step."""
    records = [json.loads(line) for line in (options["out"] / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def losses(options: dict[str, Any]) -> list[float]:
    """The loss of each step."""
    return values(options, "loss")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names, the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
