"""Llamas that transformers saved in bitsandbytes' four-bit form, read straight into JAX. Clauses C2, C3, Q3, Q4, Q8.

Axes: P packed bytes, S blocks (the legend is in `types`). A quantised weight NAME lies in the file as

    NAME                                      its packed bytes, in any storage dtype, (items, 1)
    NAME.absmax                               scales: float32, or 8-bit codes of them when nested
    NAME.quant_map                            the codebook
    NAME.quant_state.bitsandbytes__nf4        JSON in bytes: block size, shape, dtype; nested block size and offset
    NAME.nested_absmax, NAME.nested_quant_map  scales of scales and their codebook, when nested

beside weights that were left as they are. Nothing but headers and that JSON is read before all of it agrees.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from safetensors import safe_open

from ref import quant
from ref.checkpoint import (
    CheckpointMismatch,
    LlamaConfig,
    Parameters,
    assembled,
    files_by_tensor,
    kept_layers,
    read_tensor,
    tensor_shapes,
)
from ref.layouts import packed_shape
from ref.types import NestedState, PackedWeight, QuantState

STATE: Final = ".quant_state.bitsandbytes__"
"""What stands between a weight's name and its codebook's in the name of its JSON."""

ITEMSIZES: Final = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Q3: the storages of packed bytes, and how many bytes an item of each has."""


@dataclass(frozen=True)
class QuantisedCheckpoint:
    """C2: a quantised Llama, both ways."""

    parameters: Parameters
    """Everything, quantised weights decoded (Q4): what `llama.logits` takes, and what D6 measures."""

    packed: dict[str, PackedWeight]
    """The quantised weights as stored, by the layer's Hugging Face name ("model.layers.0.mlp.up_proj")."""


def read_quantised_checkpoint(directory: Path, *, dtype: DTypeLike, layers: int | None = None) -> QuantisedCheckpoint:
    """C2: a Hugging Face directory whose linear weights bitsandbytes has quantised, by transformers' `save_pretrained`.

    Args:
        directory: with config.json and one or more .safetensors files.
        dtype: of every parameter; quantised weights are decoded into the dtype that they had, and then cast.
        layers: how many of the first layers to keep, all if not given.

    Raises:
        CheckpointMismatch: tensors that are missing, beside the point, or do not fit, every one of them; an unreadable
            file; more layers than there are. Nothing has been loaded then.
    """
    config = LlamaConfig.from_json(directory / "config.json")
    kept = kept_layers(config, layers)
    files = files_by_tensor(directory)
    states = {
        name.partition(STATE)[0]: _read_json(files[name], name) | {"map": name.partition(STATE)[2]}
        for name in files
        if STATE in name
    }
    _require_fitting(directory, files, states, config)
    packed = {name: _read_packed(files, name, state) for name, state in states.items()}

    def tensor(name: str) -> np.ndarray:
        if name not in packed:
            return read_tensor(files[name], name).astype(jnp.dtype(dtype))
        return np.asarray(quant.decode(*packed[name])).astype(jnp.dtype(dtype))

    parameters = assembled(config, tensor, kept=kept)
    return QuantisedCheckpoint(parameters, {name.removesuffix(".weight"): weight for name, weight in packed.items()})


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """The state that lies in a tensor as text; empty where it is none."""
    try:
        found = json.loads(read_tensor(path, name).tobytes())
    except ValueError:
        return {}

    return found if isinstance(found, dict) else {}


def _read_packed(files: Mapping[str, Path], name: str, state: Mapping[str, Any]) -> PackedWeight:
    """Q3: bytes and state of one weight; the storage's dtype only says how many bytes an item has."""

    def part(suffix: str) -> Array:
        return jnp.asarray(read_tensor(files[name + suffix], name + suffix))

    nested = None
    if "nested_blocksize" in state:
        nested = NestedState(
            absmax=part(".nested_absmax"),
            code=part(".nested_quant_map"),
            offset=jnp.asarray(np.float32(state["nested_offset"])),
            blocksize=state["nested_blocksize"],
        )
    stored = np.ascontiguousarray(read_tensor(files[name], name)).reshape(-1).view(np.uint8)
    shape, dtype = tuple(state["shape"]), state["dtype"]

    return PackedWeight(
        jnp.asarray(stored),
        QuantState(part(".absmax"), part(".quant_map"), nested, blocksize=state["blocksize"], shape=shape, dtype=dtype),
    )


def _require_fitting(
    directory: Path, files: Mapping[str, Path], states: Mapping[str, Mapping[str, Any]], config: LlamaConfig
) -> None:
    """Every difference between headers, states and configuration, in one error."""
    shapes, wanted, faults = tensor_shapes(config), {}, []
    for name, shape in shapes.items():
        if name not in states:
            wanted[name] = (None, shape)
            continue
        said = _state_faults(states[name], shape)
        faults += [f"{name}: {fault}" for fault in said]
        wanted |= {} if said else {name + suffix: form for suffix, form in _parts(states[name]).items()}
    beside = set() if faults else set(files) - set(wanted)
    beside -= {name for name in files if STATE in name and name.partition(STATE)[0] in shapes}
    beside -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    faults += [f"{name} is no part of it" for name in sorted(beside)]
    faults += [fault for name, form in wanted.items() if (fault := _header_fault(files, name, form))]
    faults += [f"{name}: {fault}" for name in states if not faults and (fault := _code_fault(files, name))]
    if faults:
        raise CheckpointMismatch(
            f"{directory} is not the quantised Llama of its config.json: {'; '.join(faults)}",
            hint="give the files that belong together",
        )


def _state_faults(state: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the JSON of one weight."""
    if not state.get("shape"):
        return ["its quant_state is no JSON object with a shape"]
    faults = [] if tuple(state["shape"]) == shape else [f"quant_state has shape {state['shape']}, wanted {list(shape)}"]
    faults += [] if state.get("quant_type") == state["map"] else [f"quant_type {state.get('quant_type')!r}"]
    faults += [] if state.get("blocksize") in quant.BLOCKSIZES else [f"blocksize {state.get('blocksize')}"]
    faults += [] if state.get("dtype") in ("float32", "bfloat16", "float16") else [f"dtype {state.get('dtype')!r}"]
    if "nested_blocksize" in state and not isinstance(state.get("nested_offset"), float):
        faults.append("no nested_offset")

    return faults


def _parts(state: Mapping[str, Any]) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """By suffix, the dtype and shape that each tensor of a quantised weight has; the weight's own in bytes."""
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    nested = state.get("nested_blocksize")
    parts: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "": ("packed", packed_shape(count, itemsize=1)),
        ".quant_map": ("F32", (16,)),
    }
    if nested is None:
        return parts | {".absmax": ("F32", (blocks,))}

    return parts | {
        ".absmax": ("U8", (blocks,)),
        ".nested_absmax": ("F32", (-(-blocks // nested),)),
        ".nested_quant_map": ("F32", (256,)),
    }


def _header_fault(files: Mapping[str, Path], name: str, form: tuple[str | None, tuple[int, ...]]) -> str | None:
    """What is wrong with one tensor's header; an item of the packed storage may hold several bytes (Q3)."""
    if name not in files:
        return f"{name} is missing"
    with safe_open(files[name], "numpy") as stream:
        came, dtype = tuple(stream.get_slice(name).get_shape()), stream.get_slice(name).get_dtype()
    wanted_dtype, wanted = form
    if wanted_dtype == "packed":
        itemsize = ITEMSIZES.get(dtype, 0)
        fits = itemsize > 0 and came == packed_shape(2 * wanted[0], itemsize=itemsize)
    else:
        fits = came == wanted and wanted_dtype in (None, dtype)

    return None if fits else f"{name} has {dtype} {came}, wanted {wanted_dtype or 'any'} {wanted}"


def _code_fault(files: Mapping[str, Path], name: str) -> str | None:
    """Q8: what is wrong with a weight's codebook."""
    try:
        quant.require_known_code(read_tensor(files[name + ".quant_map"], name + ".quant_map"))
    except quant.QuantizationError as error:
        return str(error)

    return None
