"""Adapters in PEFT's two files, read and written. Clauses C1, C3.

Axes: I in, O out, R rank (the legend is in `types`). For a layer NAME:

    adapter_model.safetensors   base_model.model.NAME.lora_A.weight (R, I), .lora_B.weight (O, R),
                                .lora_magnitude_vector (O)
    adapter_config.json         r, lora_alpha, use_rslora, use_dora, target_modules, ...

An embedding's factors are called lora_embedding_A and lora_embedding_B, with no `.weight`; a convolution's have a
kernel, and its magnitude is stored as (1, O, 1 ...).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ref import dora
from ref.types import Adapter, InputError

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
PREFIX: Final = "base_model.model."

SPELLINGS: Final = {
    "lora_A": (".lora_A.weight", ".lora_A.default.weight", ".lora_embedding_A"),
    "lora_B": (".lora_B.weight", ".lora_B.default.weight", ".lora_embedding_B"),
    "magnitude": (
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.default.weight",
        ".lora_magnitude_vector.weight",
        ".magnitude",  # torchtune
        ".weight_m_wdecomp.weight",  # NVlabs
        ".dora_scale",  # kohya, fsdp_qlora
    ),
}
"""C1: how the end of a tensor's name says what it is, the one that is written first."""

UNSUPPORTED: Final = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias")
"""What PEFT's configuration can ask for and this reader has no meaning for: each must hold nothing."""


class AdapterMismatch(InputError):
    """Adapter files that are not what they say, or not for this model: every fault."""


@dataclass(frozen=True)
class AdapterConfig:
    """C1: what adapter_config.json says, as far as the layer's arithmetic depends on it."""

    rank: int
    """R, of every layer."""

    alpha: float
    """What the scaling is made of (D1)."""

    rank_stabilized: bool = False
    """Whether the scaling divides by the root of the rank."""

    base_model: str | None = None
    """The name of the model that it was trained on, as PEFT keeps it."""

    @property
    def scaling(self) -> float:
        """D1: s."""
        return dora.scaling(self.alpha, self.rank, rank_stabilized=self.rank_stabilized)


def read_adapter(
    directory: Path, *, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, Adapter], AdapterConfig]:
    """C1: the adapters of a directory by layer name, magnitudes under any of the names that are in use.

    Args:
        directory: with the two files.
        shapes: the weight's shape of every layer that is to have an adapter; what the file says if not given.

    Raises:
        AdapterMismatch: tensors that are missing, beside the point or misshapen, all of them; a configuration of
            something else, or that asks for what has no meaning here; a file that cannot be read. Nothing is loaded.
    """
    config = _read_config(directory / CONFIG)
    try:
        with safe_open(directory / WEIGHTS, "numpy") as stream:
            headers = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
            parts, faults = _sorted_out(headers)
            faults += _misfits(parts, headers, config, shapes)
            if faults:
                raise AdapterMismatch(f"{directory}: {'; '.join(faults)}", hint="give the files of one DoRA adapter")
            return {name: _adapter(stream, found) for name, found in parts.items()}, config
    except (OSError, SafetensorError) as error:
        raise AdapterMismatch(f"{directory / WEIGHTS} cannot be read: {error}", hint="pickles are not read") from error


def write_adapter(directory: Path, adapters: Mapping[str, Adapter], config: AdapterConfig) -> None:
    """C1: PEFT's two files, for linear layers and convolutions; the directory is made where it is missing.

    Raises:
        AdapterMismatch: adapters whose rank is not the configuration's, all of them. Nothing is written then.
    """
    faults = [
        f"{name} has rank {adapter.lora_B.shape[1]}"
        for name, adapter in adapters.items()
        if adapter.lora_B.shape[1] != config.rank
    ]
    if faults or not adapters:
        said = "; ".join(faults) or "there are none"
        raise AdapterMismatch(f"{said}, the configuration says {config.rank}", hint="write adapters of one rank")
    tensors = {}
    for name, adapter in adapters.items():
        spatial = (1,) * (adapter.lora_A.ndim - 2)
        m_O = adapter.magnitude.reshape(1, -1, *spatial) if spatial else adapter.magnitude
        for part, array in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B), ("magnitude", m_O)):
            tensors[PREFIX + name + SPELLINGS[part][0]] = np.ascontiguousarray(array)

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(_peft_config(config, sorted(adapters)), indent=2), encoding="utf-8")


def _peft_config(config: AdapterConfig, names: list[str]) -> dict[str, Any]:
    """What PEFT reads; targets are full names, so that no other layer matches by accident."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "use_rslora": config.rank_stabilized,
        "use_dora": True,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _read_config(path: Path) -> AdapterConfig:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        faults = [f"{key} is {found[key]!r}" for key in UNSUPPORTED if found.get(key)]
        faults += [] if found.get("peft_type") == "LORA" and found.get("use_dora") else ["it describes no DoRA adapter"]
        faults += [] if found.get("bias", "none") == "none" else ["it trains biases"]
        if faults:
            raise AdapterMismatch(f"{path}: {'; '.join(faults)}", hint="give a DoRA adapter of one rank and alpha")
        return AdapterConfig(
            rank=int(found["r"]),
            alpha=float(found["lora_alpha"]),
            rank_stabilized=bool(found.get("use_rslora")),
            base_model=found.get("base_model_name_or_path"),
        )
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise AdapterMismatch(f"{path} cannot be read: {error!r}", hint="give PEFT's adapter_config.json") from error


def _sorted_out(headers: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """For each layer, the name of the tensor that each part is stored under; and what is no part."""
    parts: dict[str, dict[str, str]] = {}
    faults = []
    for stored in headers:
        matches = [
            (part, stored.removesuffix(end)) for part, ends in SPELLINGS.items() for end in ends if stored.endswith(end)
        ]
        if not matches:
            faults.append(f"{stored} is no part of it")
            continue
        part, layer = matches[0]
        found = parts.setdefault(layer.removeprefix(PREFIX), {})
        faults += [f"{stored} is there twice, as {found[part]}"] if part in found else []
        found[part] = stored

    return parts, faults


def _misfits(
    parts: Mapping[str, Mapping[str, str]],
    headers: Mapping[str, tuple[int, ...]],
    config: AdapterConfig,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> list[str]:
    """Missing parts, layers without an adapter, and shapes that are not those of one layer."""
    wanted_layers = parts if shapes is None else shapes
    faults = [
        f"{name}.{part} is missing" for name in wanted_layers for part in SPELLINGS if part not in parts.get(name, {})
    ]
    faults += [f"{name} is no layer to adapt" for name in parts if name not in wanted_layers]
    for name in parts:
        if name not in wanted_layers or set(parts[name]) != set(SPELLINGS):
            continue
        A, B, m = (headers[parts[name][part]] for part in SPELLINGS)
        row, out = (A[1:], B[0]) if shapes is None else (shapes[name][1:], shapes[name][0])
        wanted = {"lora_A": (config.rank, *row), "lora_B": (out, config.rank, *(1,) * (len(A) - 2))}
        faults += [
            f"{name}.{part} has shape {came}, wanted {wanted[part]}"
            for part, came in (("lora_A", A), ("lora_B", B))
            if came != wanted[part]
        ]
        length = int(np.prod(m))
        faults += [] if length == out else [f"{name}.magnitude has shape {m}, wanted ({out},)"]

    return faults


def _adapter(stream: Any, found: Mapping[str, str]) -> Adapter:
    """One layer's adapter; the magnitude flat, whatever axes of 1 its writer gave it."""

    def part(name: str) -> Array:
        return jnp.asarray(stream.get_tensor(found[name]))

    return Adapter(part("lora_A"), part("lora_B"), part("magnitude").reshape(-1))
