"""C1, D10: layers of every kind in PEFT's files, both ways with peft itself, and merged into plain layers."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from kinds_onehot import TARGETS, TOKENS, build, moved, plain
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from torch_impl import DoraConfig, DoraLayer, apply_dora, load_adapter, merge_adapter, save_adapter
from torch_impl.errors import AdapterFileError, CheckpointError, ModelFileError
from torch_impl.files import checkpoint
from torch_impl.layers.kinds import KINDS, kind_of, rows_of
from torch_impl.training.export import ExportOptions, MergeOptions, export, merge

NEAR = 2.0**-17
"""Of the largest output: some 64 float32 roundings, where six layers round each number differently."""
IDS = torch.randint(0, TOKENS, (3, 6), generator=torch.Generator().manual_seed(3))
GPT2_TARGETS = ["wte", "c_attn", "c_fc"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # peft mends it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def near(got: Tensor, want: Tensor) -> bool:
    """Equal but for roundings."""
    return bool(((got - want).abs().max() <= NEAR * want.abs().max()).detach())


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The adapter by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:peft pads, groups or dilates:UserWarning")
def test_c1_every_kind_loads_as_it_was_saved(tmp_path: Path) -> None:
    """Loading gives every adapter tensor back, bit for bit, grouped convolutions included."""
    model = build()
    save_adapter(model, tmp_path)

    got = load_adapter(plain(), tmp_path)

    want = trainable(model)
    assert trainable(got).keys() == want.keys()
    assert all(torch.equal(trainable(got)[name], want[name]) for name in want)
    assert torch.equal(got(IDS), model(IDS))


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_c1_peft_reads_every_kind_that_we_wrote(tmp_path: Path, method: str) -> None:
    """Peft's own loader gives a model with our outputs, under peft's names."""
    model = build(as_peft=True, method=method, rank_stabilized=True)
    save_adapter(model, tmp_path)

    theirs = peft.PeftModel.from_pretrained(plain(as_peft=True), tmp_path)

    assert near(theirs(IDS), model(IDS))
    assert not near(plain(as_peft=True)(IDS), model(IDS))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_c1_we_read_every_kind_that_peft_wrote(tmp_path: Path) -> None:
    """Our loader gives a peft model's outputs, B != 0 and magnitudes off their start included."""
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=list(TARGETS))
    theirs = moved(peft.get_peft_model(plain(as_peft=True), config))
    theirs.save_pretrained(tmp_path)

    got = load_adapter(plain(as_peft=True), tmp_path)

    assert near(got(IDS), theirs(IDS))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small tied Llama, and peft's adapter of its embedding beside it, whose base weight peft saves too."""
    folder = write_model(tmp_path / "llama")
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["embed_tokens", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that they are tied, and that it saves the embedding
        theirs = moved(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config))
        theirs.save_pretrained(tmp_path / "adapter")
    torch.save(theirs(IDS).logits.detach(), tmp_path / "logits")
    return tmp_path


def test_c1_an_embeddings_base_weight_in_pefts_file_is_taken(llama: Path) -> None:
    """The file holds the base weight of an adapted embedding, and the model has peft's logits."""
    with safe_open(llama / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any(key.endswith("embed_tokens.base_layer.weight") for key in file.keys())  # noqa: SIM118

    got = load_adapter(AutoModelForCausalLM.from_pretrained(llama / "llama"), llama / "adapter")

    assert near(got(IDS).logits, torch.load(llama / "logits"))


def test_c3_a_base_weight_of_another_shape_is_refused(llama: Path) -> None:
    """An embedding that was resized before training is another model's."""
    path = llama / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("base_layer.weight"))
    save_file(tensors | {key: tensors[key][:-1].clone()}, path)

    with pytest.raises(AdapterFileError, match=r"base_layer\.weight .* is \(256, 48\), the model needs \(257, 48\)"):
        load_adapter(AutoModelForCausalLM.from_pretrained(llama / "llama"), llama / "adapter")


def test_d10_every_kind_merges_into_the_layer_it_was() -> None:
    """Plain layers of the same kinds and parameters give the adapted model's output, to float32's rounding."""
    model = build()
    want, before = model(IDS).detach(), plain()

    merged = merge_adapter(model)

    assert [type(m) for m in merged.modules()] == [type(m) for m in before.modules()]
    assert [str(m) for m in merged.children()] == [str(m) for m in before.children()]
    shapes = {name: tensor.shape for name, tensor in before.state_dict().items()}
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == shapes
    assert near(merged(IDS).detach(), want)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A small tied GPT-2, written; and the adapter of its embedding and Conv1Ds beside it."""
    folder = write_model(tmp_path / "gpt2", kind="gpt2")
    save_adapter(adapted_gpt2(folder), tmp_path / "adapter")
    return tmp_path


def adapted_gpt2(folder: Path, **config: object) -> nn.Module:
    """The GPT-2 with adapters off their start."""
    torch.manual_seed(2)
    model = GPT2LMHeadModel.from_pretrained(folder)
    return moved(apply_dora(model, DoraConfig(2, 3, GPT2_TARGETS, **config))).eval()


def test_d10_a_merged_tied_embedding_is_written_apart_from_the_head(gpt2: Path) -> None:
    """What `merge` writes, loaded by transformers, has the adapter's logits: the head keeps the weight it had."""
    want = adapted_gpt2(gpt2 / "gpt2")(IDS).logits.detach()

    merge(MergeOptions(gpt2 / "gpt2", gpt2 / "adapter", gpt2 / "merged"))

    merged = GPT2LMHeadModel.from_pretrained(gpt2 / "merged").eval()
    assert near(merged(IDS).logits.detach(), want)
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
    assert not merged.config.tie_word_embeddings
    merged.tie_weights()  # as whoever loads it may
    assert near(merged(IDS).logits.detach(), want)


def test_q1_a_conv1d_is_packed_as_rows(tmp_path: Path) -> None:
    """Under NF4 the Conv1Ds of a GPT-2 are packed as (O, I), and merge back into Conv1Ds."""
    torch.manual_seed(2)
    model = GPT2LMHeadModel.from_pretrained(write_model(tmp_path / "gpt2", kind="gpt2"))
    model = moved(apply_dora(model, DoraConfig(2, 3, "all-linear", quant="nf4"))).eval()
    want = model(IDS).logits.detach()
    packed = [layer.base.shape for layer in model.modules() if isinstance(layer, DoraLayer)]

    merged = merge_adapter(model)

    assert packed[0] == (144, 48)
    assert len(packed) == 8
    assert merged.transformer.h[0].attn.c_attn.weight.shape == (48, 144)
    assert near(merged(IDS).logits.detach(), want)


def checkpointed(gpt2: Path) -> nn.Module:
    """An adapted GPT-2 whose checkpoint of step 3 lies under `run`."""
    model = adapted_gpt2(gpt2 / "gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"rank": 2, "alpha": 3.0, "rank_stabilized": False, "method": "dora", "model": str(gpt2 / "gpt2")}
    facts = {"options": options | {"target_modules": ",".join(GPT2_TARGETS), "dropout": 0.25}}
    checkpoint.save(gpt2 / "run" / "checkpoints", model, optimizer, checkpoint.Saved(3, 6, facts))
    return model


def test_s12_export_gives_embeddings_and_conv1ds(gpt2: Path) -> None:
    """What export writes from a checkpoint is the adapter that save_adapter writes, with its dropout."""
    want = trainable(checkpointed(gpt2))

    export(ExportOptions(gpt2 / "run", gpt2 / "exported"))

    got = load_adapter(GPT2LMHeadModel.from_pretrained(gpt2 / "gpt2"), gpt2 / "exported")
    assert trainable(got).keys() == want.keys()
    assert all(torch.equal(trainable(got)[name], want[name]) for name in want)
    assert got.transformer.wte.config.dropout == 0.25


@pytest.mark.parametrize(("change", "error"), [("gone", ModelFileError), ("other", CheckpointError)])
def test_export_needs_the_model_of_the_run(gpt2: Path, change: str, error: type[Exception]) -> None:
    """A base model that is gone, or another one in its place, is refused in one line, and nothing is written."""
    checkpointed(gpt2)
    path = gpt2 / "gpt2" / "config.json"
    config = json.loads(path.read_text())
    path.unlink() if change == "gone" else path.write_text(json.dumps(config | {"n_embd": 24}))

    with pytest.raises(error, match=r"gpt2|doesn't fit"):
        export(ExportOptions(gpt2 / "run", gpt2 / "exported"))
    assert not (gpt2 / "exported").exists()


@pytest.mark.parametrize(
    "module", [nn.Linear(4, 3), Conv1D(3, 4), nn.Embedding(5, 3), nn.Conv1d(4, 6, 3)], ids=lambda m: type(m).__name__
)
def test_the_rows_name_the_kind(module: nn.Module) -> None:
    """By the name that rows have, files find what PEFT calls the tensors of the kind."""
    rows = rows_of(module)

    assert rows is not None
    assert KINDS[rows.kind] is kind_of(module)
