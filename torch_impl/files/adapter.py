"""Adapters as PEFT's two files, from any strategy.

Clauses: C1 (names and configuration), C3 (safetensors only), C4 (whole tensors only), S12.

    adapter_model.safetensors   A, B and the magnitude of each layer, by PEFT's names (see `peft_names`)
    adapter_config.json         r, lora_alpha, lora_dropout, target_modules, use_rslora, use_dora, ...
"""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from torch_impl.config import DoraConfig, QuantConfig
from torch_impl.errors import AdapterFileError
from torch_impl.files.peft_names import (
    adapter_shapes,
    as_ours,
    as_stored,
    base_shapes,
    own_name,
    stored_names,
    target_rows,
)
from torch_impl.inject import apply_dora
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.experts import DoraExperts
from torch_impl.layers.kinds import KINDS
from torch_impl.layers.quant import refuse_non_finite
from torch_impl.layers.rows import Rows
from torch_impl.sharding.local_shards import gathered, local_shards
from torch_impl.wrappers import is_sharded, unwrapped_name, without_ddp

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# what PEFT can say and this package doesn't do: each must hold nothing
_UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """C1: write the adapter as PEFT's files; called by every rank, written by rank 0, whole or not at all.

    Args:
        model: with DoRA layers, sharded by any strategy or not at all.
        folder: made where it is missing. Both files are written aside and renamed, the configuration last.

    Raises:
        AdapterFileError: no DoRA layer, layers of unequal configuration, or the files can't be written (on every rank).
    """
    config = _peft_config(model)
    layers = {name: layer.rows for name, layer in _layers(model).items()}
    tensors = dict(as_stored(name, tensor, layers) for name, tensor in _whole_adapter(model))
    writes = not distributed.is_initialized() or distributed.get_rank() == 0
    problem = _write(Path(folder), tensors, config) if writes else None
    if _anywhere(problem is not None):
        raise AdapterFileError(
            f"{folder} can't be written: {problem or 'see rank 0'}", hint="mend the folder and save again"
        )
    if writes:
        _warn_of_peft(model)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    quant: Literal["nf4"] | QuantConfig | None = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """C1: apply the configuration found in `folder`, then its weights; every name and shape is checked before either.

    Args:
        model: the base model, unsharded and without DoRA layers; it is changed in place.
        folder: with PEFT's two files.
        quant: how to store the base weights, which PEFT's files don't say.
        compute_dtype: what the layers multiply in, likewise.

    Returns:
        The same model with DoRA layers.

    Raises:
        AdapterFileError: a file is missing or truncated, is no DoRA adapter, or disagrees with the model.
        NonFiniteError: a tensor of the adapter holds NaN or infinity.
    """
    config, tensors = read_adapter(model, folder, quant=quant, compute_dtype=compute_dtype)
    model = apply_dora(model, config)
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return model


def read_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    quant: Literal["nf4"] | QuantConfig | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[DoraConfig, dict[str, Tensor]]:
    """C1, C3: the configuration and every tensor by our names, checked against a base model that isn't changed.

    Args:
        model: the base model, or its skeleton on meta.
        folder: with PEFT's two files.
        quant: how to store the base weights.
        compute_dtype: what the layers multiply in.

    Raises:
        AdapterFileError: a file is missing or truncated, is no LoRA or DoRA adapter, or disagrees with the model.
        NonFiniteError: a tensor of the adapter holds NaN or infinity.
    """
    config = _read_config(Path(folder) / CONFIG, quant=quant, compute_dtype=compute_dtype)
    return config, _read_tensors(Path(folder) / WEIGHTS, model, config)


def _layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers by their name in the unwrapped model."""
    modules = without_ddp(model).named_modules()
    return {unwrapped_name(name): layer for name, layer in modules if isinstance(layer, DoraLayer)}


def _peft_config(model: nn.Module) -> dict[str, Any]:
    """What PEFT reads; targets are full names, so that no other model's layers can match by accident."""
    layers = _layers(model)
    configs = {
        (c.rank, c.alpha, c.rank_stabilized, c.method, c.dropout) for c in (layer.config for layer in layers.values())
    }
    if len(configs) != 1:
        raise AdapterFileError(
            f"{len(configs)} adapter configurations in one model", hint="save a model that apply_dora made"
        )
    config = next(iter(layers.values())).config
    rows = {name: layer.rows for name, layer in layers.items()}
    return _peft_json(config, rows, base=getattr(without_ddp(model), "name_or_path", None))


def _peft_json(config: DoraConfig, layers: dict[str, Rows], *, base: str | None) -> dict[str, Any]:
    """The adapter's configuration as PEFT writes it."""
    experts = sorted(name for name, rows in layers.items() if rows.kind == "experts")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.method == "dora",
        "target_modules": sorted(name for name, rows in layers.items() if rows.kind != "experts"),
        **({"target_parameters": experts} if experts else {}),
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": any(KINDS[rows.kind].linear and KINDS[rows.kind].transposed for rows in layers.values()),
        "inference_mode": True,
    }


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    config: DoraConfig,
    *,
    layers: dict[str, Rows],
    base: str | None = None,
) -> None:
    """C1: write whole tensors by our names as PEFT's two files, aside and renamed; by one process.

    Args:
        folder: made where it is missing.
        tensors: by our names.
        config: the adapter's.
        layers: the rows of every layer that has an adapter (D3).
        base: the base model's name or folder.

    Raises:
        AdapterFileError: they can't be written.
    """
    stored = dict(as_stored(name, tensor, layers) for name, tensor in tensors.items())
    problem = _write(Path(folder), stored, _peft_json(config, layers, base=base))
    if problem is not None:
        raise AdapterFileError(f"{folder} can't be written: {problem}", hint="mend the folder and save again")


def _warn_of_peft(model: nn.Module) -> None:
    """Say which layers PEFT would make another function of."""
    others = {n: layer for n, layer in _layers(model).items() if not layer.is_pefts}
    for experts, does in ((True, "has no DoRA on"), (False, "pads, groups or dilates")):
        names = [name for name, layer in others.items() if isinstance(layer, DoraExperts) == experts]
        if names:
            warnings.warn(
                f"peft {does} {', '.join(names[:3])}{'' if experts else ' otherwise'} and would refuse or misread the "
                "adapter: load it with load_adapter, or merge it",
                stacklevel=3,
            )


def _whole_adapter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """C4: every adapter tensor whole, by name, on the CPU; a collective of all ranks where the model is sharded."""
    names = {f"{layer}.{leaf}" for layer, found in _layers(model).items() for leaf in found.peft_names}
    sharded = is_sharded(model)
    for shard in local_shards(model):
        if shard.kind == "parameter" and shard.name in names:
            yield shard.name, (gathered(shard) if sharded else shard.tensor.clone()).cpu().contiguous()


def _anywhere(here: bool) -> bool:
    """Whether it is so on any rank."""
    if not distributed.is_initialized():
        return here
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(here), dtype=torch.int32, device=device)
    distributed.all_reduce(flag)
    return bool(flag)


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> OSError | None:
    """Write both files aside and rename them; the problem, if there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as aside:
            save_file(tensors, Path(aside) / WEIGHTS, metadata={"format": "pt"})
            (Path(aside) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            for name in (WEIGHTS, CONFIG):
                (Path(aside) / name).replace(folder / name)
    except (OSError, SafetensorError) as problem:
        return OSError(str(problem))
    return None


def _read_config(path: Path, **own: Any) -> DoraConfig:
    """The adapter's configuration; what can't be honoured is refused, never dropped."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise AdapterFileError(
            f"{path} can't be read: {problem}", hint="give the folder that save_adapter or PEFT wrote"
        ) from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise AdapterFileError(f"{path} describes no LoRA or DoRA adapter", hint='it needs "peft_type": "LORA"')
    for key in _UNSUPPORTED:
        if found.get(key):
            raise AdapterFileError(f"{path} sets {key} to {found[key]!r}", hint="it isn't supported")
    missing = {"r", "lora_alpha", "target_modules"} - found.keys()
    if missing:
        raise AdapterFileError(f"{path} lacks {', '.join(sorted(missing))}", hint="write it again")
    return DoraConfig(
        rank=found["r"],
        alpha=found["lora_alpha"],
        target_modules=found["target_modules"] or (),
        target_parameters=found.get("target_parameters") or (),
        rank_stabilized=bool(found.get("use_rslora")),
        method="dora" if found.get("use_dora") else "lora",
        dropout=found.get("lora_dropout") or 0.0,
        **own,
    )


def _read_tensors(path: Path, model: nn.Module, config: DoraConfig) -> dict[str, Tensor]:
    """C3: the tensors by our names, their headers checked before any is read."""
    layers = target_rows(model, config)
    shapes = adapter_shapes(layers, config)
    bases = base_shapes(model, layers, config)
    known = stored_names(shapes, layers)
    stored = dict(known.values())
    try:
        with safe_open(path, "pt") as file:
            keys = {known[key][0] if key in known else own_name(key): key for key in file.keys()}  # noqa: SIM118 - it is no mapping
            _refuse_names(path, set(keys) - set(bases), set(shapes))
            for name, key in keys.items():
                _refuse_shape(path, key, tuple(file.get_slice(key).get_shape()), (stored | bases)[name])
            tensors = {
                name: as_ours(name, file.get_tensor(key), layers).reshape((shapes | bases)[name])
                for name, key in keys.items()
            }
    except (OSError, SafetensorError) as problem:
        raise AdapterFileError(f"{path} can't be read: {problem}", hint="save or copy the adapter again") from None
    for name, tensor in tensors.items():
        refuse_non_finite(tensor, f"{name} in {path}")
    return tensors


def _refuse_shape(path: Path, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """The shape must be the model's; a magnitude may have axes of 1 around it."""
    bare = tuple(size for size in found if size != 1) if "magnitude" in key else found
    if bare != (tuple(size for size in wanted if size != 1) if "magnitude" in key else wanted):
        raise AdapterFileError(
            f"{key} in {path} is {found}, the model needs {wanted}", hint="use the model it was made for"
        )


def _refuse_names(path: Path, found: set[str], wanted: set[str]) -> None:
    """The file must hold every adapter tensor of the model, and nothing else."""
    for what, names in (("lacks", wanted - found), ("has, beyond the model,", found - wanted)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise AdapterFileError(f"{path} {what} {len(names)} tensors: {some}", hint="use the model it was made for")
