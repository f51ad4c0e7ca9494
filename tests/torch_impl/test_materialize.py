"""The streamed start gives what loading the whole model and `apply_dora` give, and refuses bad files in one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from ranks import Pools
from safetensors.torch import load_file, save_file
from small import write_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from torch_impl import DoraConfig, QuantConfig, apply_dora
from torch_impl.errors import DoraError, ModelFileError, NonFiniteError, OptionError, RankError
from torch_impl.files import materialize as start
from torch_impl.files.materialize import materialize, recompute_activations, stored_quant


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


@pytest.mark.parametrize(("kind", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_a_checkpoint_of_the_model_without_its_head_loads(tmp_path: Path, kind: str, prefix: str) -> None:
    """Its names lack the model's prefix, as GPT-2's own files do; the head is the embeddings'."""
    folder = write_model(tmp_path / kind, kind=kind)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")

    assert same(materialize(folder, None), whole)


def test_a_tied_weight_is_read_under_either_name(tmp_path: Path) -> None:
    """A checkpoint that names the output head, and not the embeddings that it is tied to, holds both."""
    folder = write_model(tmp_path / "gpt2", kind="gpt2")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, folder / "model.safetensors")

    assert same(materialize(folder, None), whole)


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


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.uint8, torch.int8, torch.int32, torch.int64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stored_tensor_of_any_dtype_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Five values, one without an axis and none at all: masks and positions are stored in many dtypes."""
    want = {
        "five": torch.arange(5).to(dtype),
        "one": torch.ones((), dtype=dtype),
        "none": torch.ones(0, 3, dtype=dtype),
    }
    save_file(want, tmp_path / "model.safetensors")
    model = nn.Module()
    for name, tensor in want.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    monkeypatch.setattr(start, "skeleton", lambda *_, **__: model)

    got = dict(materialize(tmp_path, None).named_buffers())

    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("flag", ["load_in_4bit", "_load_in_4bit"])
@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({}, QuantConfig(nested=False, quant_storage=torch.uint8)),
        (
            {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
            QuantConfig(nested=True, quant_storage=torch.bfloat16),
        ),
    ],
    ids=["defaults", "nested-bfloat16"],
)
def test_c2_how_a_checkpoint_is_packed_is_read(tmp_path: Path, flag: str, more: dict, want: QuantConfig) -> None:
    """Under either name that transformers has given the flag, with bitsandbytes' own defaults where nothing is said."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {flag: True} | more}))

    assert stored_quant(tmp_path) == want


def test_what_cannot_be_adapted_is_refused_before_a_weight_is_read(folder: Path) -> None:
    """A rank beyond one layer's sides ends the start at once, not after minutes of loading."""
    begun: list[str] = []

    with pytest.raises(RankError, match="rank 50 is larger than both sides"):
        materialize(folder, DoraConfig(50, 50), note=begun.append)
    assert begun == []


class Older(nn.Module):
    """A model of a transformers that knows the switch by its older name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.options: dict[str, bool] = {}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        """As transformers passes them on to torch."""
        self.options = gradient_checkpointing_kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block, run again in the backward pass."""
        return checkpoint(self.block, x, **self.options)


def test_t5_a_recomputed_block_has_its_gradient_behind_frozen_embeddings() -> None:
    """Under the older name as well; reentrant, torch would give none, since no input wants one."""
    model = Older()

    recompute_activations(model)
    model(torch.ones(2, 4)).sum().backward()

    assert torch.equal(model.block.weight.grad, torch.full((4, 4), 2.0))


def test_t5_recomputed_blocks_of_transformers_have_their_gradients(folder: Path) -> None:
    """The first block's input is that of frozen embeddings: its adapters train all the same."""
    model = materialize(folder, DoraConfig(3, 6))

    recompute_activations(model)
    model(torch.arange(12)[None]).logits.sum().backward()

    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_packed_checkpoint_s_model_no_longer_says_that_it_is_packed(folder: Path) -> None:
    """Its layers are ours: who saves the merged model writes plain weights, under a plain configuration."""
    path = folder / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))

    assert getattr(start.skeleton(folder, dtype=None).config, "quantization_config", None) is None


def test_a_model_that_will_not_do_is_refused_before_a_weight_is_read(folder: Path) -> None:
    """The caller's own check sees the skeleton; what it raises comes first, though no weight could be read."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()

    def check(model: nn.Module) -> None:
        assert all(parameter.is_meta for parameter in model.parameters())
        raise OptionError("no", hint="none")

    with pytest.raises(OptionError):
        materialize(folder, None, check=check)


@pytest.mark.distributed
@pytest.mark.parametrize(("load", "rank_1_has"), [("rank0", "the weights"), ("each", "its own zeros")])
def test_who_reads_the_weights(pools: Pools, tmp_path: Path, load: str, rank_1_has: str) -> None:
    """Rank 0 alone, or each rank its own files: those of rank 1 hold zeros here."""
    whole = load_file(write_model(tmp_path / "0", kind="gpt2") / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    write_model(tmp_path / "1", kind="gpt2")
    save_file(zeros, tmp_path / "1" / "model.safetensors", metadata={"format": "pt"})

    first, second = pools.run(2, "wires:materialized", folder=str(tmp_path), load=load)

    assert all(torch.equal(first[name], whole[name]) for name in whole)
    assert all(torch.equal(second[name], (whole if rank_1_has == "the weights" else zeros)[name]) for name in whole)
