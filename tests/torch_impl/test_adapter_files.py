"""C1 to C4, D10, S12: adapter files against peft itself, and from every strategy."""

import json
from collections.abc import Callable
from pathlib import Path

import onehot
import peft
import pytest
import torch
from onehot import Stack, build
from ranks import Pools
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torch_impl import DoraConfig, apply_dora, load_adapter, merge_adapter, save_adapter
from torch_impl.errors import AdapterFileError, NonFiniteError, OptionError, ShardingError

CASE = Stack(sizes=(24, 17, 6), rank=3)


def base_model() -> nn.Module:
    """The plain model below the tests' adapters."""
    torch.manual_seed(5)
    return onehot.Net(CASE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter in it."""
    save_adapter(build(CASE), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_c1_what_is_saved_loads_bit_for_bit(saved: Path) -> None:
    """Loading gives every adapter tensor back."""
    want = {n: p for n, p in build(CASE).named_parameters() if p.requires_grad}

    got = {n: p for n, p in load_adapter(base_model(), saved).named_parameters() if p.requires_grad}

    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_c1_peft_reads_what_we_wrote(saved: Path) -> None:
    """Peft's own loader gives a model with our outputs."""
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    want = build(CASE)(x).detach()

    model = peft.PeftModel.from_pretrained(base_model(), saved)

    assert torch.allclose(model(x).detach(), want, rtol=0, atol=float(want.abs().max()) * 2.0**-18)


def test_c1_we_read_what_peft_wrote(tmp_path: Path) -> None:
    """Our loader gives a peft model's outputs, B != 0 and magnitudes off their start included."""
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["layers.0", "layers.1"])
    theirs = peft.get_peft_model(base_model(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter)) if "lora" in name else None
    theirs.save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    want = theirs(x).detach()

    got = load_adapter(base_model(), tmp_path)(x).detach()

    assert torch.allclose(got, want, rtol=0, atol=float(want.abs().max()) * 2.0**-18)


def test_d9_dropout_travels_with_the_adapter(tmp_path: Path) -> None:
    """What is saved with dropout trains with it when loaded, by peft and by us."""
    save_adapter(apply_dora(base_model(), DoraConfig(rank=3, alpha=5, dropout=0.25)), tmp_path)

    assert load_adapter(base_model(), tmp_path).layers[0].config.dropout == 0.25
    theirs = peft.PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True).base_model.model
    assert theirs.layers[0].lora_dropout["default"].p == 0.25


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2", "none"])
@pytest.mark.parametrize("world", [1, 3])
def test_c4_a_sharded_model_saves_whole_tensors(pools: Pools, tmp_path: Path, world: int, strategy: str) -> None:
    """From any strategy and world size the files are those of the unsharded model, byte for byte."""
    save_adapter(build(CASE), tmp_path / "whole")

    pools.run(world, "onehot:save", strategy=strategy, case=CASE, folder=str(tmp_path / "sharded"))

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "sharded").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.distributed
def test_c4_a_folder_that_cannot_be_written_raises_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    """No rank waits for one that failed, and nothing is left behind."""
    (tmp_path / "taken").write_text("a file")

    answers = pools.run(2, "onehot:save_fails", case=CASE, folder=str(tmp_path / "taken"))

    assert answers == ["AdapterFileError"] * 2
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("quant", [None, "nf4"], ids=["dense", "nf4"])
def test_d10_merged_layers_compute_the_same(quant: str | None) -> None:
    """Plain linear layers with the merged weight give the adapted model's output, to float32's rounding."""
    x = torch.randn(5, 24)
    model = apply_dora(base_model(), DoraConfig(rank=3, alpha=5, quant=quant))
    nn.init.normal_(model.layers[0].lora_B, std=0.1)
    want = model(x).detach()

    merged = merge_adapter(model)

    assert [type(layer) for layer in merged.layers] == [nn.Linear, nn.Linear]
    assert torch.allclose(merged(x).detach(), want, rtol=0, atol=float(want.abs().max()) * 2.0**-18)


def _truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def _configured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


A0 = "base_model.model.layers.0.lora_A.weight"
BROKEN = {
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), AdapterFileError, "can't be read"),
    "config-not-json": (lambda f: (f / "adapter_config.json").write_text("{"), AdapterFileError, "can't be read"),
    "no-weights": (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterFileError, "can't be read"),
    "truncated": (_truncate, AdapterFileError, "can't be read"),
    "other-peft-type": (_configured(peft_type="LOHA"), AdapterFileError, "no LoRA or DoRA adapter"),
    "dropout": (_configured(lora_dropout=1.5), OptionError, "dropout 1.5 is no probability"),
    "patterns": (_configured(rank_pattern={"layers.0": 2}), AdapterFileError, "rank_pattern"),
    "other-rank": (_configured(r=2), AdapterFileError, r"is \(3, 24\), the model needs \(2, 24\)"),
    "missing-tensor": (_tensors(lambda t: t.pop(A0)), AdapterFileError, r"lacks 1 tensors: layers\.0\.lora_A"),
    "other-tensor": (_tensors(lambda t: t.update(x=torch.zeros(1))), AdapterFileError, "beyond the model"),
    "nan": (_tensors(lambda t: t[A0].view(-1)[30].fill_(float("nan"))), NonFiniteError, r"holds nan at index \(1, 6\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_c3_broken_files_are_refused_and_the_model_is_untouched(saved: Path, name: str) -> None:
    """Each broken folder raises with the place named, before the model is changed."""
    damage, error, part = BROKEN[name]
    damage(saved)
    model = base_model()

    with pytest.raises(error, match=part):
        load_adapter(model, saved)
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.Linear]


def test_nothing_is_left_half_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails midway the old adapter is still whole, and no other file is left."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr(
        "torch_impl.files.adapter.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )

    with pytest.raises(AdapterFileError, match="disk full"):
        save_adapter(build(CASE), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_c1_the_file_says_that_it_is_pytorchs(saved: Path) -> None:
    """The file lacks the metadata without which transformers reads no safetensors."""
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()

    assert metadata == {"format": "pt"}


def test_d10_a_sharded_model_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are merged as if they were whole layers."""
    monkeypatch.setattr("torch_impl.merge.is_sharded", lambda _: True)

    with pytest.raises(ShardingError, match="can't be merged"):
        merge_adapter(build(CASE))
