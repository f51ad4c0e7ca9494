"""Training checkpoints: what they hold of a model, its optimizer and the generators; `checkpoint_files` keeps them.

Clauses: T6 (a resumed run is the run that was never stopped), S12 (any world size), C4 (shards stay shards).

    NAME, optimizer:exp_avg/NAME, ...   each rank's range of the row-major flattening of the whole tensor
    rng/RANK, rng:cuda/RANK             the rank's generators
    state.json                          step, position in the data, optimizer, schedule, options, every tensor's size

Every strategy holds a contiguous range of the flattened tensor (S1, S2), so one layout serves all, and what one
strategy wrote another reads. Where tensor ranks share rows (S10), each writes and reads whole ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_impl.errors import CheckpointError
from torch_impl.files import checkpoint_disk as checkpoint_files
from torch_impl.files.checkpoint_disk import VERSION, FlatRange, rank, world_size
from torch_impl.sharding.local_shards import LocalShard, gathered, local_shards

_KINDS = {"step": int, "position": int, "world_size": int, "optimizer": str, "groups": list, "tensors": dict}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says besides its tensors."""

    step: int
    """Optimizer steps done."""
    position: int
    """Sequences dealt."""
    facts: dict[str, Any]
    """What the run must agree with: options, fingerprints."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved) -> Path:
    """Write one checkpoint under `folder`; called by every rank.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: it can't be written, on every rank; what was there before is untouched.
    """
    shards = _shards(model, optimizer)
    held = {name: _flat(shard) for name, shard in shards.items()}
    state = _state_json(optimizer, saved, _sizes(shards))
    drawn = {_generator_name(device): get() for device, (get, _) in generators().items()}
    return checkpoint_files.write(folder, saved.step, held | drawn, state)


def generators() -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """What a model may draw from on this rank: by device, how to read and to set its state."""
    found = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    return found | ({"cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state)} if torch.cuda.is_available() else {})


def _generator_name(device: str) -> str:
    """The stored name of this rank's generator."""
    return f"rng/{rank()}" if device == "cpu" else f"rng:{device}/{rank()}"


def _shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, LocalShard]:
    """Trainable parameters and their optimizer state, by name."""
    found: dict[str, LocalShard] = {}
    for shard in local_shards(model, optimizer):
        if shard.kind == "gradient" or shard.name.rpartition(".")[2] not in ("lora_A", "lora_B", "magnitude"):
            continue
        found[shard.name if shard.kind == "parameter" else f"{shard.kind}/{shard.name}"] = shard
    return found


def _flat(shard: LocalShard, *, empty: bool = False) -> FlatRange:
    """A shard as a range of the row-major flattening: whole rows are contiguous.

    It shares the model's memory; but of rows that tensor ranks share (S10) it is a copy of the whole ones, put together
    by all ranks, or room for them where it is to be `empty`.
    """
    size = math.prod(shard.global_shape)
    if len(shard.index) == len(shard.global_shape) and shard.tensor.dim() == len(shard.global_shape):
        start = shard.index[0].start * math.prod(shard.global_shape[1:])
    else:
        start = shard.index[0].start
    part = shard.tensor
    if _shares_rows(shard):
        part = part.new_empty(part.shape[0], *shard.global_shape[1:]) if empty else gathered(shard)[shard.index[0]]
    return FlatRange(part.reshape(-1), start if part.numel() else 0, size)


def _shares_rows(shard: LocalShard) -> bool:
    """S10: whether other ranks have the rest of each of its rows."""
    return shard.tensor.dim() > 1 and shard.tensor.shape[1:] != shard.global_shape[1:]


def _sizes(tensors: dict[str, LocalShard]) -> dict[str, int]:
    """Elements of each whole tensor, the same on every rank; one with nothing of a parameter has no state of it."""
    parameters = {name: math.prod(held.global_shape) for name, held in tensors.items() if "/" not in name}
    kinds = sorted({name.partition("/")[0] for name in tensors if "/" in name})
    return parameters | {f"{kind}/{name}": size for kind in kinds for name, size in parameters.items()}


def _state_json(optimizer: torch.optim.Optimizer, saved: Saved, sizes: dict[str, int]) -> dict[str, Any]:
    """All that isn't a tensor."""
    groups = [{key: v for key, v in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "version": VERSION,
        "step": saved.step,
        "position": saved.position,
        "world_size": world_size(),
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "generators": list(generators()),
        "tensors": sizes,
        "facts": saved.facts,
    }


def read_state(place: Path) -> tuple[dict[str, Any], Saved]:
    """What a checkpoint says besides its tensors, once all of it has been found whole.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or one too many; or it is of another version.
    """
    state = checkpoint_files.read_state(place)
    wrong = [key for key, kind in (_KINDS | {"facts": dict}).items() if not isinstance(state.get(key), kind)]
    if wrong or state.get("version") != VERSION:
        what = f"has no {wrong[0]}" if wrong else f"is of version {state.get('version')}, not {VERSION}"
        raise CheckpointError(f"{place / checkpoint_files.STATE} {what}", hint="use the version that wrote it")
    return state, Saved(state["step"], state["position"], state["facts"])


def load_(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved:
    """Load a checkpoint into a sharded model and a fresh optimizer, in place; called by every rank.

    At the world size that wrote it each rank's generators go on where they stopped.

    Raises:
        CheckpointError: it isn't whole, or doesn't fit the model.
    """
    state, saved = read_state(place)
    if state["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(f"{place} was written with {state['optimizer']}", hint="use the same --optimizer")
    _make_state_(optimizer, step=saved.step)
    shards = _shards(model, optimizer)
    sizes, stored = _sizes(shards), state["tensors"]
    wrong = sorted(name for name in sizes.keys() | stored.keys() if sizes.get(name) != stored.get(name))
    if wrong or len(state["groups"]) != len(optimizer.param_groups):
        what = ", ".join(wrong[:3]) or "its optimizer's groups"
        raise CheckpointError(f"{place} doesn't fit this model: {what}", hint="use the same adapter options")
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    drawn = _stored_generators(state)
    tensors = {name: _flat(shard, empty=True) for name, shard in shards.items()}
    checkpoint_files.read_tensors(place, tensors | drawn)
    for name, shard in shards.items():
        if _shares_rows(shard):
            shard.tensor.copy_(tensors[name].part.view(-1, *shard.global_shape[1:])[:, shard.index[1]])
    for device, (_, put) in generators().items():
        if _generator_name(device) in drawn:
            put(drawn[_generator_name(device)])
    return saved


def _stored_generators(state: dict[str, Any]) -> dict[str, Tensor]:
    """Room for those of this rank's generators that the checkpoint holds: none at another world size."""
    held = state.get("generators", ["cpu"]) if state["world_size"] == world_size() else []
    return {_generator_name(device): get() for device, (get, _) in generators().items() if device in held}


def _make_state_(optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Optimizer tensors of the right sizes, to be read into, as they would be after `step` steps."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if step == 0:
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                empty = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **empty}
            elif group["momentum"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def read_adapter(place: Path) -> dict[str, Tensor]:
    """The whole trained tensors of a checkpoint by name, flattened, in float32; no optimizer state.

    Raises:
        CheckpointError: it isn't whole.
    """
    sizes = {name: size for name, size in read_state(place)[0]["tensors"].items() if "/" not in name}
    whole = {name: FlatRange(torch.empty(size, dtype=torch.float32), 0, size) for name, size in sizes.items()}
    checkpoint_files.read_tensors(place, dict(whole))
    return {name: held.part for name, held in whole.items()}
