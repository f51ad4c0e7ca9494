"""`merge` and `export`: a plain checkpoint out of an adapter, an adapter out of a training checkpoint.

Clauses: D10 merge, C1 adapter files, C3 (safetensors only), S12 (from any world size and strategy).
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor, nn

from torch_impl.config import DoraConfig
from torch_impl.errors import CheckpointError, OptionError
from torch_impl.files import checkpoint
from torch_impl.files import checkpoint_disk as checkpoint_files
from torch_impl.files.adapter import WEIGHTS, read_adapter, write_adapter
from torch_impl.files.materialize import materialize, skeleton
from torch_impl.files.peft_names import adapter_shapes, target_rows
from torch_impl.merge import merge_adapter
from torch_impl.training import continuation
from torch_impl.training.options import Dtype, parameters, targets, torch_dtype

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class MergeOptions:
    """Write a plain checkpoint that transformers loads, the adapter merged into its weights."""

    model: Path
    """The base model's Hugging Face checkpoint."""
    adapter: Path
    """The adapter: PEFT's two files, as `train` leaves them under adapter/."""
    out: Path
    """Where to write; it must not exist yet."""
    quant: Literal["none", "nf4"] = "none"
    """How the base was stored in training: nf4 merges into the dequantised weights that the adapter was trained on."""
    dtype: Dtype = "auto"
    """The base model's dtype, in which the result is written; auto is the checkpoint's."""


@dataclass(frozen=True)
class ExportOptions:
    """Write PEFT's adapter files from a training checkpoint, at one process, whatever ranks wrote it."""

    run: Path
    """The training's --out."""
    out: Path
    """Where to write the adapter."""
    step: int | None = None
    """The checkpoint's step; the newest if not given."""


@torch.no_grad()
def merged_model(
    folder: Path, adapter: Path, *, quant: Literal["nf4"] | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """D10: the model with plain layers of weight c * V, streamed, formed in float32 and rounded once to its dtype.

    Args:
        folder: the base model.
        adapter: PEFT's two files, checked against the model's skeleton before a weight is read.
        quant: how the base was stored in training.
        dtype: the base model's; None is its configuration's.

    Raises:
        AdapterFileError: the adapter is damaged or of another model.
        ModelFileError: the base model's files are.
    """
    with torch.device("meta"):
        bare = skeleton(folder, dtype=dtype)
    config, tensors = read_adapter(bare, adapter, quant=quant)
    model = materialize(folder, config, dtype=dtype)
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)
    return merge_adapter(model)


def merge(options: MergeOptions) -> int:
    """The verb: merge, write aside, rename, and say what precision was written.

    Raises:
        DoraError: what can't be done as asked; nothing is left behind.
    """
    _refuse_existing(options.out, options.out)
    model: Any = merged_model(
        options.model,
        options.adapter,
        quant=None if options.quant == "none" else "nf4",
        dtype=torch_dtype(options.dtype),
    )
    try:
        _write_model(model, options)
    except (OSError, SafetensorError) as problem:
        raise OptionError(f"--out {options.out} can't be written: {problem}", hint="give a writable folder") from None
    lossy = "dequantised from nf4, " if options.quant == "nf4" else ""
    dtype = next(model.parameters()).dtype
    _say(f"{options.out}: plain weights, {lossy}c * V formed in float32 and rounded once to {dtype}")
    return 0


def _write_model(model: Any, options: MergeOptions) -> None:
    """Weights, configuration and tokenizer, aside and renamed."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=".merge-") as aside:
        place = Path(aside) / "model"
        model.save_pretrained(place)
        for pattern in _TOKENIZER_FILES:
            for path in options.model.glob(pattern):
                shutil.copyfile(path, place / path.name)
        place.replace(options.out)


def export(options: ExportOptions) -> int:
    """The verb: a checkpoint's adapter as PEFT's files.

    Raises:
        OptionError: there is an adapter where it is to be written.
        CheckpointError: there is none, or it isn't whole.
        ModelFileError: the base model's configuration isn't where it was in training.
    """
    _refuse_existing(options.out, options.out / WEIGHTS)
    place = _chosen(options)
    _, saved = checkpoint.read_state(place)
    made_with = continuation.made_with(place, saved.facts)
    config = DoraConfig(
        rank=made_with["rank"],
        alpha=made_with["alpha"],
        target_modules=targets(made_with["target_modules"]),
        target_parameters=parameters(made_with["target_parameters"]),
        rank_stabilized=made_with["rank_stabilized"],
        method=made_with["method"],
        dropout=made_with["dropout"],
    )
    with torch.device("meta"):
        layers = target_rows(skeleton(Path(made_with["model"]), dtype=None), config)
    tensors = _shaped(place, adapter_shapes(layers, config))
    write_adapter(options.out, tensors, config, layers=layers, base=made_with["model"])
    _say(f"{options.out}: the adapter of step {saved.step}, {len(tensors)} tensors in float32")
    return 0


def _chosen(options: ExportOptions) -> Path:
    """The checkpoint that is meant."""
    folder = options.run / "checkpoints"
    place = checkpoint_files.newest(folder) if options.step is None else folder / f"step-{options.step:06d}"
    if place is None or not place.is_dir():
        held = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
        raise CheckpointError(f"{folder} holds no such checkpoint", hint=f"it holds {held or 'none'}")
    return place


def _shaped(place: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A checkpoint's adapter, each tensor in its own shape."""
    found = checkpoint.read_adapter(place)
    if {name: flat.numel() for name, flat in found.items()} != {n: math.prod(shape) for n, shape in shapes.items()}:
        raise CheckpointError(f"{place} doesn't fit its base model", hint="put the model back where it was in training")
    return {name: flat.view(shapes[name]) for name, flat in found.items()}


def _refuse_existing(out: Path, written: Path) -> None:
    """Nothing is ever overwritten."""
    if written.exists():
        raise OptionError(f"--out {out}: {written.name} exists", hint="give a new directory")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def merge_command(words: Sequence[str]) -> int:
    """`python -m torch_impl merge`."""
    return merge(tyro.cli(MergeOptions, args=list(words), prog="python -m torch_impl merge"))


def export_command(words: Sequence[str]) -> int:
    """`python -m torch_impl export`."""
    return export(tyro.cli(ExportOptions, args=list(words), prog="python -m torch_impl export"))
