"""The streamed start gives what loading the whole model and `apply_dora` give, and refuses bad files in one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from small import write_model
from torch import nn
from transformers import AutoModelForCausalLM

from torch_impl import DoraConfig, apply_dora
from torch_impl.errors import DoraError, ModelFileError, NonFiniteError
from torch_impl.materialize import materialize


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    return write_model(tmp_path / "model")


def same(left: nn.Module, right: nn.Module) -> bool:
    """Equal names, dtypes and bits of all parameters and buffers, and the same parameters trainable."""
    a, b = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (left, right))
    return a.keys() == b.keys() and all(
        torch.equal(bits(a[n]), bits(b[n])) and a[n].dtype == b[n].dtype and a[n].requires_grad == b[n].requires_grad
        for n in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Packed bytes viewed as bf16 may read as NaN, which equals nothing: compare bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_d6_streamed_is_loaded_whole_and_adapted(
    folder: Path, method: str, quant: str | None, dtype: torch.dtype
) -> None:
    """Bytes, quant states, magnitudes, adapters' start: the same bits as from_pretrained and apply_dora."""
    config = DoraConfig(rank=3, alpha=6, quant=quant, method=method)
    torch.manual_seed(4)
    streamed = materialize(folder, config, dtype=dtype)
    torch.manual_seed(4)
    whole = apply_dora(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config)

    assert same(streamed, whole)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert not any(p.is_meta for p in streamed.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_plain_model_loads_too(tmp_path: Path, kind: str) -> None:
    """With no adapter the model is from_pretrained's, buffers included, whatever prefix its names have."""
    folder = write_model(tmp_path / kind, kind=kind)
    tokens = torch.arange(12)[None]
    whole = AutoModelForCausalLM.from_pretrained(folder)

    assert torch.equal(materialize(folder, None).eval()(tokens).logits, whole.eval()(tokens).logits)


def test_c2_a_checkpoint_that_bitsandbytes_packed_keeps_its_bytes(folder: Path) -> None:
    """A four-bit checkpoint as transformers writes it loads into the same layers as packing on arrival."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    packed = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or "embed" in name:
            packed[name] = tensor
            continue
        bytes_, state = quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
        packed |= {name: bytes_} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    torch.manual_seed(4)
    want = materialize(folder, DoraConfig(3, 6, quant="nf4"))
    for file in (*files, folder / "model.safetensors.index.json"):
        file.unlink()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))

    torch.manual_seed(4)
    assert same(materialize(folder, DoraConfig(3, 6, quant="nf4")), want)


def _first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _lie(folder: Path) -> None:
    path = _first(folder)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + size].replace(b"[257,48]", b"[48,257]")
    path.write_bytes(raw[:8] + header + raw[8 + size :])


def _poison(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("0.mlp.up_proj.weight"):
                tensor[2, 3] = float("nan")
                save_file(tensors, path, metadata={"format": "pt"})


def _pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def _escape(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


def _configure(**wrong: object) -> Callable[[Path], object]:
    """Put values into the configuration."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))

    return damage


BROKEN: dict[str, tuple[Callable[[Path], object], type[DoraError], str]] = {
    "truncated": (lambda f: _first(f).write_bytes(_first(f).read_bytes()[:-9]), ModelFileError, "can't be read"),
    "missing-file": (lambda f: _first(f).unlink(), ModelFileError, "can't be read"),
    "lying-shape": (_lie, ModelFileError, "the model needs"),
    "nan": (_poison, NonFiniteError, r"up_proj.weight holds nan at index \(2, 3\)"),
    "pickle": (_pickle, ModelFileError, "no pickle is read"),
    "escape": (_escape, ModelFileError, "weights lie beside their index"),
    "no-config": (lambda f: (f / "config.json").unlink(), ModelFileError, "can't be read"),
    "config-not-json": (lambda f: (f / "config.json").write_text("{"), ModelFileError, "can't be read"),
    "config-null": (lambda f: (f / "config.json").write_text("null"), ModelFileError, "can't be read"),
    "config-text": (_configure(hidden_size="48"), ModelFileError, "hidden_size"),
    "config-negative": (_configure(hidden_size=-48), ModelFileError, "negative dimension"),
    "config-heads": (_configure(num_attention_heads=0), ModelFileError, "ZeroDivisionError"),
    "config-dtype": (_configure(dtype="no"), ModelFileError, "can't be read"),
    "unknown-kind": (lambda f: (f / "config.json").write_text('{"model_type": "no"}'), ModelFileError, "can't be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_c3_bad_model_files_are_refused_in_one_line(folder: Path, name: str) -> None:
    """The class, the file, the mend."""
    damage, error, words = BROKEN[name]
    damage(folder)

    with pytest.raises(error, match=words) as caught:
        materialize(folder, DoraConfig(3, 6, quant="nf4"))
    assert "\n" not in str(caught.value)
