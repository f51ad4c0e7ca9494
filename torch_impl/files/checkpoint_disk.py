"""Checkpoints on disk: written aside and renamed, listed with checksums, read only where they are whole.

Clauses: S12 (any world size reads what any other wrote), C3 (no pickle), C4 (shards stay shards).

    step-000005/
      shard-*.safetensors   each rank's ranges of flattened tensors, with their offsets
      state.json            all that isn't a tensor
      manifest.json         sha256 and size of each file above

All is written to `.writing-step-...`, flushed to disk, and renamed by rank 0 once every rank is done: a name without
the dot is whole. `torch_impl.files.checkpoint` says what is in them.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from torch_impl.errors import CheckpointError

MANIFEST, STATE = "manifest.json", "state.json"
_ASIDE = ".writing-"
VERSION = 1


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


def write(folder: Path, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write one checkpoint under `folder`; called by every rank.

    Args:
        folder: made where it is missing.
        step: its name.
        tensors: what this rank holds: whole tensors under names of its own, `FlatRange`s under shared ones.
        state: what JSON holds; rank 0's is written.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: it can't be written, on every rank; what was there before is untouched.
    """
    name = f"step-{step:06d}"
    aside = folder / f"{_ASIDE}{name}"
    _together(folder, lambda: _start(folder, aside), here=_is_first())
    _together(folder, lambda: _write_tensors(aside, tensors), here=True)
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


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step; unfinished writes and other folders don't count."""
    found = [path for path in folder.glob("step-*") if path.is_dir()] if folder.is_dir() else []
    steps = {int(path.name[5:]): path for path in found if re.fullmatch(r"step-\d{6,}", path.name)}
    return steps[max(steps)] if steps else None


def read_state(place: Path) -> dict[str, Any]:
    """Check every file against the manifest, then give what isn't a tensor.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or one too many.
    """
    hint = f"remove {place.name} to go on from the one before it"
    try:
        listed = json.loads((place / MANIFEST).read_text())["files"]
        for name, facts in listed.items():
            path = place / Path(name).name
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path} is not what was written: size or checksum differ", hint=hint)
        extra = {path.name for path in place.iterdir()} - {MANIFEST, *listed}
        if extra:
            raise CheckpointError(f"{place} holds {min(extra)}, which its manifest doesn't name", hint=hint)
        return dict(json.loads((place / STATE).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{place} can't be read: {problem}", hint=hint) from None


def read_tensors(place: Path, tensors: dict[str, Any]) -> None:
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


def rank() -> int:
    """This process's place; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes write and read together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _is_first() -> bool:
    return rank() == 0


def _alone() -> bool:
    return world_size() == 1
