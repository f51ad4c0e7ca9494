"""Bounded start: a model on the meta device, its weights streamed from safetensors, packed as they arrive.

Clauses: C2 (bitsandbytes checkpoints), C3 (safetensors only), D6, Q7.

    skeleton       modules on meta; buffers real (rotary tables are computed, not stored)
    each module    a target: read its weight -> quantise -> adapter, magnitude from what the forward will use
                   any other: read its own parameters
At any moment the memory holds what has arrived, packed, and one tensor as the file has it. Nothing is initialised only
to be overwritten, and the adapters come out as `apply_dora` makes them on the loaded model with the same seed.
"""

import ctypes
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn

from torch_impl import inject
from torch_impl.config import DoraConfig, QuantConfig
from torch_impl.errors import ModelFileError
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.experts import Stack
from torch_impl.layers.kinds import Target
from torch_impl.timing import timed

_TRIM_EVERY = 2**24
"""Bytes of weights that pass through memory before what they left free is returned."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES |= {"U8": torch.uint8, "I8": torch.int8, "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


def materialize(
    folder: Path,
    config: DoraConfig | None,
    *,
    dtype: torch.dtype | None = None,
    load: Literal["each", "rank0"] = "each",
    note: Callable[[str], None] = lambda _: None,
    check: Callable[[nn.Module], None] = lambda _: None,
) -> nn.Module:
    """The model with adapters, loaded with no second full-precision copy.

    Args:
        folder: a Hugging Face checkpoint of safetensors; a bitsandbytes 4-bit one too.
        config: the adapter; None loads the plain model.
        dtype: the base model's; None is the one its configuration says.
        load: `each` rank reads, or `rank0` does and sends (then every rank needs the files' headers all the same).
        note: called with each module's name before it is loaded.
        check: called with the skeleton before a weight is read; it raises where the model won't do.

    Raises:
        ModelFileError: files are missing, damaged, pickled, or disagree with the configuration.
        DoraError: what `apply_dora` refuses.
    """
    model = skeleton(folder, dtype=dtype)
    check(model)
    reader = _Reader(folder, model, sends=load == "rank0")
    names = list(inject.target_names(model, config)) if config else []
    for name in names:
        inject.refuse_target(name, inject.target(model, name), config)
    targets = {name: inject.target(model, name) for name in names}
    first = {module: name for name, module in reversed(targets.items())}
    made: dict[Target, DoraLayer] = {}
    passed = 0
    for name, module in list(model.named_modules()):
        note(name)
        _load_own(reader, name, module, packed_allowed=module in first)
        stacks = [s for s in map(partial(Stack, module), module._parameters) if s in first]  # noqa: SLF001
        for ready in [module] if module in first else stacks:
            made[ready] = inject.dora_linear(ready, config, name=first[ready])
            passed += ready.weight.nbytes
            owner, leaf = (ready.owner, ready.leaf) if isinstance(ready, Stack) else (ready, "weight")
            owner.register_parameter(leaf, nn.Parameter(torch.empty(0), requires_grad=False))  # it has been packed
            if passed > _TRIM_EVERY:
                passed = _give_back()
    if config:
        model.requires_grad_(False)
    for name, module in targets.items():
        inject.put(model, name, module, made[module])
    return model


def _give_back() -> int:
    """Return freed memory to the system, and 0: small lasting tensors between large passing ones keep glibc from it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return 0


def skeleton(folder: Path, *, dtype: torch.dtype | None) -> nn.Module:
    """The model with its parameters on meta, in `dtype` or the configuration's.

    Raises:
        ModelFileError: the configuration can't be read, or is of no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - takes seconds

    path = _configuration(folder)
    stored_quant(folder)  # refuse what can't be read
    try:
        found = json.loads(path.read_text())
        found.pop("quantization_config", None)
        config = AutoConfig.for_model(**found)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    except Exception as problem:  # noqa: BLE001 - transformers raises all kinds at a configuration that is wrong
        reason = textwrap.shorten(f"{type(problem).__name__}: {problem}", 200)
        raise ModelFileError(f"{path} can't be read: {reason}", hint="give a causal model's checkpoint") from None
    model.name_or_path = str(folder)
    return model.train()


def stored_quant(folder: Path) -> QuantConfig | None:
    """C2: how a checkpoint's own linear layers are packed, by its configuration; None where they are plain.

    Raises:
        ModelFileError: the configuration can't be read, or names another quantisation than bitsandbytes' four bits.
    """
    path = _configuration(folder)
    try:
        stored = dict(json.loads(path.read_text())).get("quantization_config")
        if not stored:
            return None
        if stored.get("load_in_4bit") or stored.get("_load_in_4bit"):
            storage = getattr(torch, stored.get("bnb_4bit_quant_storage") or "uint8")
            return QuantConfig(nested=bool(stored.get("bnb_4bit_use_double_quant")), quant_storage=storage)
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise ModelFileError(f"{path} can't be read: {problem}", hint="give a causal model's checkpoint") from None
    raise ModelFileError(
        f"{path} is quantised by {stored.get('quant_method')}", hint="give a plain checkpoint, or bitsandbytes' 4 bits"
    )


def _configuration(folder: Path) -> Path:
    """A checkpoint's config.json, which may be named itself."""
    return folder / "config.json" if folder.is_dir() else folder


def recompute_activations(model: Any) -> None:
    """T5: keep each block's input alone, and run the block again in the backward pass; no bit changes."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # transformers before it was renamed
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter goes to meta as it is registered, so that no initialisation touches memory; buffers stay."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _load_own(reader: "_Reader", name: str, module: nn.Module, *, packed_allowed: bool = False) -> None:
    """Put the module's own parameters (and stored buffers) in place; tied ones are read once and stay tied."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        full = f"{name}.{leaf}".lstrip(".")
        if parameter.device.type != "meta":
            continue
        if packed_allowed and leaf == "weight" and reader.is_packed(full):
            module.weight = reader.packed(full, tuple(parameter.shape), parameter.dtype)
            continue
        with timed("read"):
            loaded = nn.Parameter(reader.read(full, parameter), requires_grad=parameter.requires_grad)
        for other, where in reader.owners[id(parameter)]:
            other.register_parameter(where, loaded)
    for leaf, buffer in module.named_buffers(recurse=False):
        full = f"{name}.{leaf}".lstrip(".")
        if reader.has(full):
            buffer.copy_(reader.read(full, buffer))


class _Reader:
    """The checkpoint's tensors by the model's names, each read when it is asked for, in memory of its own."""

    def __init__(self, folder: Path, model: nn.Module, *, sends: bool) -> None:
        self.folder = folder
        self.sends = sends and distributed.is_initialized() and distributed.get_world_size() > 1
        self.prefix = getattr(model, "base_model_prefix", "") + "."
        self.files = _files(folder)
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        self.aliases: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self.owners.setdefault(id(parameter), []).append((module, leaf))
                self.aliases.setdefault(id(parameter), []).append(f"{name}.{leaf}".lstrip("."))

    def key(self, name: str) -> str | None:
        """The stored name of a tensor: the model's own, or that of the model without its head."""
        bare = name.removeprefix(self.prefix)
        return next((key for key in (name, bare) if key in self.files), None)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds it."""
        return self.key(name) is not None

    def read(self, name: str, like: Tensor) -> Tensor:
        """One tensor in the dtype of `like`, its shape checked before its bytes are touched.

        Raises:
            ModelFileError: it is missing, damaged, or of another shape or kind.
        """
        names = [*self.aliases.get(id(like), ()), name]
        key = next((key for key in map(self.key, names) if key), None)
        if key is None:
            raise ModelFileError(f"{self.folder} lacks {name}", hint="give the whole checkpoint of this model")
        return self._raw(key, tuple(like.shape)).to(like.dtype)

    def _raw(self, key: str, shape: tuple[int, ...] | None) -> Tensor:
        """A tensor as stored, in memory of its own (the file's pages can be dropped)."""
        try:
            with safe_open(self.folder / self.files[key], "pt") as file:
                header = file.get_slice(key)
                found, kind = tuple(header.get_shape()), header.get_dtype()
                if (shape is not None and found != shape) or kind not in _DTYPES:
                    raise ModelFileError(
                        f"{key} in {self.files[key]} is {kind} {found}, the model needs {shape}",
                        hint="the files and config.json are not of one model",
                    )
            place = (self.folder / self.files[key], key, found, _DTYPES[kind])
            return self._sent(*place) if self.sends else _read_unmapped(*place)
        except (OSError, SafetensorError) as problem:
            raise ModelFileError(
                f"{self.folder / self.files[key]} can't be read: {problem}", hint="copy the checkpoint again"
            ) from None

    def _sent(self, path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's bytes, on every rank."""
        first = distributed.get_rank() == 0
        tensor = _read_unmapped(path, key, shape, dtype) if first else torch.empty(shape, dtype=dtype)
        distributed.broadcast(tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor, src=0)
        return tensor

    def is_packed(self, name: str) -> bool:
        """C2: whether bitsandbytes has packed this weight."""
        key = self.key(name)
        return key is not None and self._state_key(key) is not None

    def _state_key(self, key: str) -> str | None:
        """The stored name of what says how a weight is packed."""
        return next((k for q in ("nf4", "fp4") if (k := f"{key}.quant_state.bitsandbytes__{q}") in self.files), None)

    def packed(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """A frozen parameter of packed bytes with its quant state, as bitsandbytes' layers hold it.

        Raises:
            ModelFileError: the state is damaged, or of another shape.
        """
        from bitsandbytes.functional import QuantState  # noqa: PLC0415 - see torch_impl.layers.quant

        key = self.key(name) or name
        leaves = [other for other in self.files if other.startswith(f"{key}.")]
        try:
            state = QuantState.from_dict({leaf: self._raw(leaf, None) for leaf in leaves}, torch.device("cpu"))
        except (ValueError, KeyError, AssertionError) as problem:
            raise ModelFileError(f"{key}: bad quant state: {problem}", hint="save the checkpoint again") from None
        if tuple(state.shape) != shape:
            raise ModelFileError(f"{key} is packed from {tuple(state.shape)}, the model needs {shape}", hint="as above")
        state.dtype = dtype
        weight = nn.Parameter(self._raw(key, None), requires_grad=False)
        weight.quant_state = state
        return weight


def _read_unmapped(path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor's bytes, read into its own memory: a mapped file would count a second time while it is copied.

    Raises:
        OSError: the file ends before the tensor does.
    """
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[key]["data_offsets"]
        file.seek(8 + length + start)
        got = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if got != stop - start or got != tensor.nbytes:
        raise OSError(f"{key} is cut off")
    return tensor


def _files(folder: Path) -> dict[str, str]:
    """Stored tensor names and the file that holds each (C3: never a pickle)."""
    try:
        if (folder / _INDEX).is_file():
            found = json.loads((folder / _INDEX).read_text())["weight_map"]
            outside = [file for file in found.values() if Path(file).name != file]
            if outside:
                raise ModelFileError(f"{folder / _INDEX} names {outside[0]}", hint="weights lie beside their index")
            return found
        with safe_open(folder / _SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as problem:
        pickled = any(folder.glob("*.bin")) if folder.is_dir() else False
        hint = "convert its .bin files: no pickle is read" if pickled else f"it needs {_SINGLE} or {_INDEX}"
        raise ModelFileError(f"{folder} holds no readable weights: {problem}", hint=hint) from None
