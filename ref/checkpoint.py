"""Reading a Hugging Face Llama: its configuration, the shapes that this implies, its tensors as a pytree.

Axes: L layers, D width, V vocabulary, H heads, K heads of keys and values, E features of a head, O out, I in. Nothing
is read before every header agrees with config.json. What is computed from it stands in `llama`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from ref.types import InputError, PackedWeight

ROPE_TYPES: Final = ("default", "linear", "llama3")
"""The kinds of rotary position that `llama.inverse_frequencies` knows."""

IGNORED: Final = ".rotary_emb.inv_freq"
"""How the name of a buffer ends that old checkpoints carry; it follows from the configuration."""


class CheckpointMismatch(InputError):
    """A checkpoint that is not the Llama its configuration describes: which tensors, and how."""


@dataclass(frozen=True)
class LlamaConfig:
    """What config.json says of a Llama, as far as its arithmetic depends on it."""

    vocab_size: int
    """V."""
    hidden_size: int
    """D."""
    intermediate_size: int
    """The width inside the feed-forward part."""
    num_hidden_layers: int
    """L, as the checkpoint has it; fewer may be read."""
    num_attention_heads: int
    """H."""
    num_key_value_heads: int
    """K, which divides H."""
    head_dim: int
    """E."""
    rms_norm_eps: float
    """What is added to the mean square before its root."""
    rope: Mapping[str, Any]
    """`rope_theta`, `rope_type` (default, linear or llama3) and what that type needs."""
    tie_word_embeddings: bool
    """Whether the embedding is the output head as well."""
    attention_bias: bool
    """Whether q, k, v and o have biases."""
    mlp_bias: bool
    """Whether gate, up and down have biases."""

    @classmethod
    def from_json(cls, path: Path) -> "LlamaConfig":
        """Read config.json, of transformers 4 or 5.

        Raises:
            CheckpointMismatch: no file that can be read; another family, activation or kind of rotary position, or a
                size that is missing.
        """
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as problem:
            raise CheckpointMismatch(f"{path}: {problem}", hint="give a Hugging Face model's directory") from problem
        _require_known(found, path)
        rope = {"rope_theta": found.get("rope_theta", 10000.0), "rope_type": "default"}
        rope |= found.get("rope_parameters") or found.get("rope_scaling") or {}
        rope["rope_type"] = rope.get("type", rope["rope_type"])
        if rope["rope_type"] not in ROPE_TYPES:
            raise CheckpointMismatch(
                f"{path}: rope_type {rope['rope_type']!r}", hint=f"known are {', '.join(ROPE_TYPES)}"
            )
        heads = found["num_attention_heads"]
        derived = {
            "num_key_value_heads": found.get("num_key_value_heads") or heads,
            "head_dim": found.get("head_dim") or found["hidden_size"] // heads,
            "rms_norm_eps": found.get("rms_norm_eps", 1e-6),
            "rope": rope,
        }
        flags = {key: bool(found.get(key)) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
        return cls(**{key: found[key] for key in _SIZES}, **derived, **flags)


_SIZES: Final = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _require_known(found: Mapping[str, Any], path: Path) -> None:
    for key, wanted in (("model_type", "llama"), ("hidden_act", "silu")):
        if found.get(key, wanted) != wanted:
            raise CheckpointMismatch(
                f"{path}: {key} is {found[key]!r}, wanted {wanted!r}", hint="give another checkpoint"
            )
    missing = [key for key in _SIZES if not isinstance(found.get(key), int)]
    if missing:
        raise CheckpointMismatch(f"{path}: no {', '.join(missing)}", hint="give a Llama's configuration")


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class Parameters:
    """Everything that a checkpoint holds; a pytree, so that a gradient has the same form."""

    embedding: Float[Array, "V D"]
    """A row for each token."""

    layers: dict[str, Float[Array, "L ..."] | PackedWeight]
    """By the name inside a layer ("self_attn.q_proj.weight"), all layers stacked along the first axis; a linear weight
    may be packed in four bits."""

    norm: Float[Array, " D"]
    """The weight of the last norm."""

    head: Float[Array, "V D"] | None
    """The output head; None where it is tied to the embedding."""


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of a block by the name inside it, each with `(out, in)`."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    width, inner = config.hidden_size, config.intermediate_size

    return {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def linear_names(config: LlamaConfig, *, layers: int | None = None) -> list[str]:
    """The Hugging Face names of all linear layers but the head, in order: what adapters may be given for."""
    count = config.num_hidden_layers if layers is None else layers

    return [f"model.layers.{layer}.{name}" for layer in range(count) for name in linear_shapes(config)]


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a block, by the name inside it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear_shapes(config).items():
        shapes[f"{name}.weight"] = shape
        if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
            shapes[f"{name}.bias"] = shape[:1]
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")

    return shapes | dict.fromkeys(norms, (config.hidden_size,))


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its Hugging Face name."""
    table = (config.vocab_size, config.hidden_size)
    blocks = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in layer_shapes(config).items()
    }
    head = {} if config.tie_word_embeddings else {"lm_head.weight": table}

    return {"model.embed_tokens.weight": table, **blocks, "model.norm.weight": (config.hidden_size,), **head}


def read_checkpoint(directory: Path, *, dtype: DTypeLike, layers: int | None = None) -> Parameters:
    """C3: the parameters of a Hugging Face directory, from safetensors alone, cast to `dtype`.

    Args:
        directory: with config.json and one or more .safetensors files.
        dtype: of every parameter.
        layers: how many of the first layers to keep, all if not given; the last norm and the head follow them.

    Raises:
        CheckpointMismatch: tensors that are missing, beside the point, or of another shape than the configuration
            says; a file that cannot be read; more layers than there are. Nothing has been loaded then.
        InputError: float64 without jax_enable_x64.
    """
    config = LlamaConfig.from_json(Path(directory) / "config.json")
    kept = kept_layers(config, layers)
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise InputError(f"{dtype} is not to be had", hint="set jax_enable_x64")
    files = files_by_tensor(directory)
    _require_shapes(directory, files, tensor_shapes(config), tied=config.tie_word_embeddings)

    return assembled(config, lambda name: read_tensor(files[name], name).astype(jnp.dtype(dtype)), kept=kept)


def assembled(config: LlamaConfig, tensor: Callable[[str], np.ndarray], *, kept: int) -> Parameters:
    """The parameters of the first `kept` layers, from a function that gives each tensor by its Hugging Face name."""

    def read(*names: str) -> Array:
        """One tensor, or several stacked: half as much memory again as the result, for a moment."""
        parts = [tensor(name) for name in names]
        return jnp.asarray(parts[0] if len(parts) == 1 else np.stack(parts))

    return Parameters(
        embedding=read("model.embed_tokens.weight"),
        layers={
            name: read(*(f"model.layers.{layer}.{name}" for layer in range(kept))).reshape(kept, *shape)
            for name, shape in layer_shapes(config).items()
        },
        norm=read("model.norm.weight"),
        head=None if config.tie_word_embeddings else read("lm_head.weight"),
    )


def kept_layers(config: LlamaConfig, layers: int | None) -> int:
    """How many layers to keep, once it is known that there are as many."""
    kept = config.num_hidden_layers if layers is None else layers
    if not 1 <= kept <= config.num_hidden_layers:
        raise CheckpointMismatch(
            f"{kept} layers of {config.num_hidden_layers}", hint="ask for 1 or more, of those there"
        )

    return kept


def files_by_tensor(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as stream:
                found |= dict.fromkeys(stream.keys(), path)
        except SafetensorError as error:
            raise CheckpointMismatch(f"{path} cannot be read: {error}", hint="download it again") from error
    if not found:
        raise CheckpointMismatch(f"no .safetensors file in {directory}", hint="pickles are not read: convert them")

    return {name: path for name, path in found.items() if not name.endswith(IGNORED)}


def _require_shapes(
    directory: Path, files: Mapping[str, Path], wanted: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    """Every difference between the headers and the configuration, in one error."""
    surplus = set(files) - set(wanted) - ({"lm_head.weight"} if tied else set())
    faults = [f"{name} is missing" for name in wanted if name not in files]
    faults += [f"{name} is no part of it" for name in sorted(surplus)]
    for name, shape in wanted.items():
        if name in files:
            with safe_open(files[name], "numpy") as stream:
                came = tuple(stream.get_slice(name).get_shape())
            faults += [] if came == shape else [f"{name} has shape {came}, wanted {shape}"]
    if faults:
        raise CheckpointMismatch(
            f"{directory} is not the Llama of its config.json: {'; '.join(faults)}",
            hint="give the files that belong together",
        )


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a file."""
    with safe_open(path, "numpy") as stream:
        return stream.get_tensor(name)


def by_name(parameters: Parameters) -> dict[str, Any]:
    """Parameters, or their gradient, under their Hugging Face names, no longer stacked."""
    named: dict[str, Any] = {"model.embed_tokens.weight": parameters.embedding, "model.norm.weight": parameters.norm}
    if parameters.head is not None:
        named["lm_head.weight"] = parameters.head
    for name, stacked in parameters.layers.items():
        named |= {
            f"model.layers.{layer}.{name}": jax.tree.map(lambda array, layer=layer: array[layer], stacked)
            for layer in range(jax.tree.leaves(stacked)[0].shape[0])
        }

    return named
