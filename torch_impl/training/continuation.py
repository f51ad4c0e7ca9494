"""Whether a run is the one that a checkpoint is of: what must be the same, what may differ and is said.

Clauses: T6 (a resumed run is the run that was never stopped).
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch_impl.errors import CheckpointError
from torch_impl.files.checkpoint_disk import sha256
from torch_impl.training.options import TrainOptions

# what a resumed run must share with the run that it continues
_SAME = ("method", "quant", "rank", "alpha", "rank_stabilized", "target_modules", "target_parameters", "optimizer")
_SAME += ("dtype", "compute_dtype")
# what changes no bit of a run; any other difference is said
_FREE = ("model", "data", "out", "resume", "save_every", "eval_every", "checkpoint_activations", "cpu_offload", "load")
_FREE += ("phase_timeout", "tensorboard", "quant_storage")
_MIB = 2**20


def facts(options: TrainOptions) -> dict[str, Any]:
    """What a checkpoint remembers of its run: options, and what model and data were."""
    config = options.model / "config.json"
    weights = sorted(options.model.glob("*.safetensors"))
    sizes = {path.name: path.stat().st_size for path in weights}
    return {
        "options": options.to_json(),
        "model": hashlib.sha256(json.dumps(sizes).encode() + config.read_bytes()).hexdigest(),
        "weights": hashlib.sha256(b"".join(map(_edges, weights))).hexdigest(),
        "data": sha256(options.data),
    }


def _edges(path: Path) -> bytes:
    """A file's first and last MiB, which tell one model's weights from another's without reading them all."""
    with path.open("rb") as file:
        first = file.read(_MIB)
        file.seek(-min(_MIB, path.stat().st_size), os.SEEK_END)
        return first + file.read()


def made_with(place: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint's run; one that is newer than the checkpoint was at its default.

    Raises:
        CheckpointError: there are none.
    """
    if not isinstance(kept.get("options"), dict):
        raise CheckpointError(f"{place} doesn't say what run it is of", hint="use one that train wrote")
    return {field.name: field.default for field in dataclasses.fields(TrainOptions)} | kept["options"]


def differences(place: Path, kept: dict[str, Any], present: dict[str, Any], *, worlds: tuple[int, int]) -> list[str]:
    """What has changed since a checkpoint, in words: a run that goes on from it isn't its own continuation.

    Args:
        place: the checkpoint.
        kept: its `facts`.
        present: those of the run that would go on.
        worlds: the world sizes of both.

    Raises:
        CheckpointError: it was made with another model, or its adapter is another.
    """
    then, now = made_with(place, kept), made_with(place, present)
    then["world_size"], now["world_size"] = worlds
    other = [name for name in _SAME if then[name] != now[name]]
    # a checkpoint may be older than a fact
    other += ["model"] if any(kept.get(name, present[name]) != present[name] for name in ("model", "weights")) else []
    if other:
        raise CheckpointError(f"{place} was made with another {', '.join(other)}", hint="use the same options")
    changed = [name for name in now if name not in (*_SAME, *_FREE) and then[name] != now[name]]
    content = ["what data holds"] if kept.get("data") != present["data"] else []
    return [f"{name} ({then[name]} -> {now[name]})" for name in changed] + content
