"""Whether a Llama checkpoint is what it says: its configuration, its safetensors headers and its file sizes.

No byte of a weight is read, no pickle is opened, and neither torch, jax nor transformers is loaded.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from parity.errors import CannotRun

HINT = "download the checkpoint again, or give another --model DIR"
HEADER_BYTES = 100_000_000
"""safetensors' own limit on a header."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The floating dtypes a Llama checkpoint may hold, by safetensors' names."""
MOST_LAYERS = 10_000
"""More than any Llama has; a configuration that claims more is not believed."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LEGACY = ".rotary_emb.inv_freq"
"""A buffer that old checkpoints carry and nobody reads."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


class CheckpointError(CannotRun):
    """A checkpoint is missing, cut short, or not what it says; the message is one line."""

    def __init__(self, place: Path, problem: str, *, hint: str) -> None:
        super().__init__(f"{place}: {problem}", hint=hint)


@dataclass(frozen=True)
class Entry:
    """One tensor as a safetensors header declares it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check(model: Path) -> None:
    """Judge a Llama checkpoint by its configuration, its headers and its file sizes; no weight is read.

    Raises:
        CheckpointError: naming the file, the tensor, what came and what was wanted.
    """
    described = configuration(model)
    entries: dict[str, Entry] = {}
    for file in _weight_files(model):
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(file, f"tensor {name} is also in {entries[name].file.name}", hint=HINT)
            entries[name] = entry
    _compare(entries, dict(_expected(described)), model, tied=bool(described.get("tie_word_embeddings")))


def configuration(model: Path) -> dict[str, Any]:
    """config.json of a Llama, with the sizes as positive integers and the derived ones filled in."""
    path = model / "config.json"
    if not path.is_file():
        raise CheckpointError(path, "is missing", hint="give --model a Hugging Face checkpoint's directory")
    found = _json(path, path.read_bytes())
    if found.get("model_type") != "llama":
        want = "only the Llama family (model_type llama) is known"
        raise CheckpointError(path, f"model_type is {found.get('model_type')!r}, wanted 'llama'", hint=want)
    if found.get("quantization_config"):
        raise CheckpointError(path, "the checkpoint is quantised already", hint="give one of plain floating weights")
    found["num_key_value_heads"] = found.get("num_key_value_heads") or found.get("num_attention_heads")
    for key in SIZES:
        value = found.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(path, f"{key} is {value!r}, wanted a positive integer", hint=HINT)
    found["head_dim"] = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    if not isinstance(found["head_dim"], int) or found["num_hidden_layers"] > MOST_LAYERS:
        odd = f"head_dim {found['head_dim']!r}, num_hidden_layers {found['num_hidden_layers']}"
        raise CheckpointError(path, f"cannot be a Llama's: {odd}", hint=HINT)
    return found


def _weight_files(model: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or in parts; never a pickle."""
    index, single = model / "model.safetensors.index.json", model / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(p.name for p in model.iterdir() if p.suffix in PICKLES)
        found = f"only pickles are there ({pickles[0]}), which are never opened" if pickles else "is missing"
        raise CheckpointError(single, found, hint="save the model as safetensors, or give another --model DIR")
    parts = _json(index, index.read_bytes()).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise CheckpointError(index, "has no weight_map", hint=HINT)
    names = sorted({str(part) for part in parts.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(index, f"names {name!r}, wanted a .safetensors file beside it", hint=HINT)
        if not (model / name).is_file():
            raise CheckpointError(model / name, "is missing, though the index names it", hint=HINT)
    return [model / name for name in names]


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file declares, its offsets proved to cover the file exactly.

    Format: 8 bytes little-endian length, that much JSON, then the data (https://github.com/huggingface/safetensors).

    Raises:
        CheckpointError: the file is cut short, or its header lies.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):  # noqa: PLR2004 - the prefix, as the docstring says
            raise CheckpointError(file, f"{size} bytes cannot hold the header of {length} bytes it claims", hint=HINT)
        header = _json(file, stream.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, declared) for name, declared in header.items()}
    _contiguous(file, entries, size - 8 - length)
    return entries


def _entry(file: Path, name: str, declared: Any) -> Entry:
    """One declaration, its byte count equal to what its dtype and shape need."""
    fields = declared if isinstance(declared, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            file, f"tensor {name} has dtype {dtype!r}, wanted one of {', '.join(ITEM_BYTES)}", hint=HINT
        )
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):  # noqa: PLR2004 - begin and end
        raise CheckpointError(file, f"tensor {name} has shape {shape!r} and offsets {offsets!r}", hint=HINT)
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        came = f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}, wanted {wanted}"
        raise CheckpointError(file, f"tensor {name} has {came}", hint=HINT)
    return Entry(file, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _contiguous(file: Path, entries: Mapping[str, Entry], data: int) -> None:
    """No hole, no overlap, nothing beyond the end of the file."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    if not ordered or ordered[0][1].begin:
        raise CheckpointError(file, "no tensor begins at byte 0 of the data", hint=HINT)
    for (_, left), (name, right) in pairwise(ordered):
        if right.begin != left.end:
            raise CheckpointError(file, f"tensor {name} begins at byte {right.begin}, wanted {left.end}", hint=HINT)
    name, last = ordered[-1]
    if last.end != data:
        problem = f"tensor {name} ends at byte {last.end} of the data, the file holds {data}: cut short, or a lie"
        raise CheckpointError(file, problem, hint=HINT)


def _expected(c: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Llama of this configuration with its shape (out, in)."""
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    heads, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    attention = {"q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        for part, projections in (("self_attn", attention), ("mlp", mlp)):
            bias = c.get("attention_bias" if part == "self_attn" else "mlp_bias")
            for name, shape in projections.items():
                yield f"model.layers.{layer}.{part}.{name}.weight", shape
                if bias:
                    yield f"model.layers.{layer}.{part}.{name}.bias", shape[:1]
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def _compare(found: Mapping[str, Entry], want: dict[str, tuple[int, ...]], model: Path, *, tied: bool) -> None:
    """Every tensor is there, none is beside the point, each has its shape."""
    for name, shape in want.items():
        if name not in found:
            if tied and name == "lm_head.weight":
                continue
            raise CheckpointError(model, f"tensor {name} is missing, wanted {list(shape)}", hint=HINT)
        entry = found[name]
        if entry.shape != shape:
            came = f"tensor {name} has shape {list(entry.shape)}, config.json wants {list(shape)}"
            raise CheckpointError(entry.file, came, hint=HINT)
    for name, entry in found.items():
        if name not in want and not name.endswith(LEGACY):
            raise CheckpointError(entry.file, f"tensor {name} is no part of the Llama in config.json", hint=HINT)


def _json(path: Path, content: bytes) -> dict[str, Any]:
    """One JSON object in which no name comes twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"holds no valid JSON ({error})", hint=HINT) from error
    if not isinstance(found, dict):
        raise CheckpointError(path, f"holds a JSON {type(found).__name__}, wanted an object", hint=HINT)
    return found
