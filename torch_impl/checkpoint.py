"""Training checkpoints: safetensors by torch.distributed.checkpoint, JSON for the rest, checksums, one rename.

Clauses: T6 (a resumed run is the run that was never stopped), S12 (any world size), C3 (no pickle), C4 (shards stay
shards).

    checkpoints/step-000005/
      shard-*.safetensors   each rank's ranges, with their offsets, of
                              NAME, optimizer:exp_avg/NAME, ...   row-major flattening of the whole tensor
                              rng/RANK                            the rank's generator
      state.json            step, position in the data, optimizer, schedule, options, every tensor's size
      manifest.json         sha256 and size of each file above

Every strategy holds a contiguous range of the flattened tensor (S1, S2), so one layout serves all, and what one
strategy wrote another reads. All is written to `.writing-step-...`, flushed to disk, and renamed by rank 0 once every
rank is done: a name without the dot is whole.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from torch_impl.errors import CheckpointError
from torch_impl.shards import LocalShard, local_shards

MANIFEST, STATE = "manifest.json", "state.json"
_ASIDE = ".writing-"
VERSION = 1


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says besides its tensors."""

    step: int
    """Optimizer steps done."""
    position: int
    """Sequences dealt."""
    facts: dict[str, Any]
    """What the run must agree with: options, fingerprints."""


class FlatRange:
    """A rank's range of a flattened tensor, in the protocol by which torch.distributed.checkpoint asks for shards."""

    def __init__(self, part: Tensor, start: int, size: int) -> None:
        self.part, self.start, self.whole = part, start, size

    def size(self) -> torch.Size:
        """Of the whole flattened tensor."""
        return torch.Size([self.whole])

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        if not self.part.numel():
            return []
        data = TensorWriteData(
            chunk=self.__create_chunk_list__()[0],
            properties=TensorProperties.create_from_tensor(self.part),
            size=self.size(),
        )
        index = MetadataIndex(fqn, torch.Size([self.start]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.part.numel():
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.part.shape)]


class _SavePlanner(dcp.DefaultSavePlanner):
    """Torch's, which looks for a shard only in tensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, FlatRange) else super().lookup_object(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Likewise; and it leaves alone what isn't a tensor, where torch's copies it."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.part if isinstance(found, FlatRange) else super().lookup_tensor(index)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved) -> Path:
    """Write one checkpoint under `folder`; called by every rank.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: it can't be written, on every rank; what was there before is untouched.
    """
    name = f"step-{saved.step:06d}"
    aside = folder / f"{_ASIDE}{name}"
    _together(folder, lambda: _start(folder, aside), here=_is_first())
    tensors = _tensors(model, optimizer) | {f"rng/{_rank()}": _generator_state()}
    _together(folder, lambda: _write_tensors(aside, tensors), here=True)
    state = _state_json(optimizer, saved, _sizes(tensors))
    _together(folder, lambda: _finish(aside, folder / name, state), here=_is_first())
    return folder / name


def _together(folder: Path, work: Any, *, here: bool) -> None:
    """Do a part of a save where it is to be done; a failure anywhere is a failure everywhere."""
    problem: BaseException | None = None
    if here:
        try:
            work()
        except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
            problem = error
    worst = torch.tensor(int(problem is not None))
    distributed.all_reduce(worst) if distributed.is_initialized() else None
    if bool(worst):
        for left in folder.glob(f"{_ASIDE}*") if _is_first() and folder.is_dir() else ():
            shutil.rmtree(left, ignore_errors=True)
        raise CheckpointError(
            f"no checkpoint can be written under {folder}: {_reason(problem)}",
            hint="free space or mend the folder, then --resume; earlier checkpoints are whole",
        )


def _reason(problem: BaseException | None) -> str:
    """The cause, in one line; torch wraps it."""
    if isinstance(problem, dcp.api.CheckpointException):
        problem = next(iter(problem.failures.values()))[0]
    return " ".join(str(problem).split()) if problem else "see the rank that failed"


def _start(folder: Path, aside: Path) -> None:
    """An empty directory aside, and nothing left of writes that were cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(left)
    aside.mkdir()


def _write_tensors(aside: Path, tensors: dict[str, Any]) -> None:
    """Each rank its own file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates parts of its own writer
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=_alone(),
        )


def _finish(aside: Path, final: Path, state: dict[str, Any]) -> None:
    """The JSON files, everything on disk, and the rename that makes it a checkpoint."""
    (aside / STATE).write_text(json.dumps(state, indent=1) + "\n")
    files = sorted(path for path in aside.iterdir() if path.is_file())
    listed = {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}
    (aside / MANIFEST).write_text(json.dumps({"version": VERSION, "files": listed}, indent=1) + "\n")
    for path in (*files, aside / MANIFEST, aside):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    aside.replace(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """What was written to this file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """A file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trainable parameters and their optimizer state, by name, as flat ranges that share the model's memory."""
    found: dict[str, Any] = {}
    for shard in local_shards(model, optimizer):
        if shard.kind == "gradient" or shard.name.rpartition(".")[2] not in ("lora_A", "lora_B", "magnitude"):
            continue
        name = shard.name if shard.kind == "parameter" else f"{shard.kind}/{shard.name}"
        found[name] = _flat(shard)
    return found


def _flat(shard: LocalShard) -> FlatRange:
    """A shard as a range of the row-major flattening: whole rows are contiguous."""
    size = math.prod(shard.global_shape)
    if len(shard.index) == len(shard.global_shape) and shard.tensor.dim() == len(shard.global_shape):
        start = shard.index[0].start * math.prod(shard.global_shape[1:])
    else:
        start = shard.index[0].start
    return FlatRange(shard.tensor.view(-1), start if shard.tensor.numel() else 0, size)


def _sizes(tensors: dict[str, Any]) -> dict[str, int]:
    """Elements of each whole tensor, the same on every rank; one with nothing of a parameter has no state of it."""
    held = [name for name, value in tensors.items() if isinstance(value, FlatRange)]
    parameters = {name: tensors[name].whole for name in held if "/" not in name}
    kinds = sorted({name.partition("/")[0] for name in held if "/" in name})
    return parameters | {f"{kind}/{name}": size for kind in kinds for name, size in parameters.items()}


def _state_json(optimizer: torch.optim.Optimizer, saved: Saved, sizes: dict[str, int]) -> dict[str, Any]:
    """All that isn't a tensor."""
    groups = [{key: v for key, v in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "version": VERSION,
        "step": saved.step,
        "position": saved.position,
        "world_size": 1 if _alone() else distributed.get_world_size(),
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "tensors": sizes,
        "facts": saved.facts,
    }


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step; unfinished writes don't count."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []
    return found[-1] if found else None


def read_state(place: Path) -> tuple[dict[str, Any], Saved]:
    """Check every file against the manifest, then give what the checkpoint says.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or one too many.
    """
    hint = f"remove {place.name} to go on from the one before it"
    try:
        listed = json.loads((place / MANIFEST).read_text())["files"]
        for name, facts in listed.items():
            path = place / name
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path} is not what was written: size or checksum differ", hint=hint)
        extra = {path.name for path in place.iterdir()} - {MANIFEST, *listed}
        if extra:
            raise CheckpointError(f"{place} holds {min(extra)}, which its manifest doesn't name", hint=hint)
        state = json.loads((place / STATE).read_text())
        return state, Saved(state["step"], state["position"], state["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{place} can't be read: {problem}", hint=hint) from None


def load_(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved:
    """Load a checkpoint into a sharded model and a fresh optimizer, in place; called by every rank.

    At the world size that wrote it each rank's generator goes on where it stopped.

    Raises:
        CheckpointError: it isn't whole, or doesn't fit the model.
    """
    state, saved = read_state(place)
    if state["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(f"{place} was written with {state['optimizer']}", hint="use the same --optimizer")
    _make_state_(optimizer, step=saved.step)
    for group, stored in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()})
    tensors = _tensors(model, optimizer)
    if _sizes(tensors) != state["tensors"]:
        wrong = sorted(dict(_sizes(tensors).items() ^ state["tensors"].items()))[:3]
        raise CheckpointError(
            f"{place} doesn't fit this model: {', '.join(wrong)}", hint="use the same adapter options"
        )
    generator = _generator_state() if state["world_size"] == _world_size() else None
    _read_tensors(place, tensors | ({f"rng/{_rank()}": generator} if generator is not None else {}))
    if generator is not None:
        torch.set_rng_state(generator)
    return saved


def _read_tensors(place: Path, tensors: dict[str, Any]) -> None:
    """Each rank reads its ranges, whatever ranges were written."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(place)),
                planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=_alone(),
            )
    except (OSError, SafetensorError, dcp.api.CheckpointException) as problem:
        raise CheckpointError(f"{place} can't be read: {_reason(problem)}", hint="copy it again") from None


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


def _generator_state() -> Tensor:
    """The default generator on this rank, as bytes."""
    return torch.get_rng_state()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _is_first() -> bool:
    return _rank() == 0


def _alone() -> bool:
    return _world_size() == 1


def read_adapter(place: Path) -> dict[str, Tensor]:
    """The whole trained tensors of a checkpoint by name, flattened, in float32; no optimizer state.

    Raises:
        CheckpointError: it isn't whole.
    """
    sizes = {name: size for name, size in read_state(place)[0]["tensors"].items() if "/" not in name}
    whole = {name: FlatRange(torch.empty(size, dtype=torch.float32), 0, size) for name, size in sizes.items()}
    _read_tensors(place, dict(whole))
    return {name: held.part for name, held in whole.items()}
