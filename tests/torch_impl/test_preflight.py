"""S1, S2, S6, S7, S8, D6, D11, T1: what `preflight` finds before anything is wrapped, and what it counts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import llama
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from ranks import Pools
from shapes import peft_dora
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from torch_impl import DoraConfig, QuantConfig, ShardConfig
from torch_impl.__main__ import main
from torch_impl.preflight.report import preflight

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def on_meta(**config: object) -> nn.Module:
    """A Llama of shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**(HEADS | config)))


def bnb_storage() -> nn.Module:
    """One Linear4bit with bf16 storage in a block."""
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", quant_storage=torch.bfloat16)
    return nn.ModuleList([layer.to("cpu")])


class Aside(nn.Module):
    """A magnitude that is kept in a ParameterDict, away from its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)]).requires_grad_(requires_grad=False)
        self.magnitudes = nn.ParameterDict({"layers_0": nn.Parameter(torch.ones(8))})


def unmaterialised() -> nn.Module:
    """DoRA layers of which one magnitude is still on meta."""
    model = llama.build("f32")
    layer = model.model.layers[1].mlp.up_proj
    layer.magnitude = nn.Parameter(layer.magnitude.to("meta"))
    return model


PLANTED: dict[str, tuple[Callable[[], nn.Module], ShardConfig, str, str, str]] = {
    "peft-mixed-dtypes": (lambda: peft_dora(torch.bfloat16), ShardConfig("fsdp1"), "S7", "dtype", "lora_"),
    "peft-orig": (lambda: peft_dora(torch.float32), ShardConfig("fsdp1-orig"), "S8", "IndexError", "magnitude_vector"),
    "bf16-storage-fp16-wire": (bnb_storage, ShardConfig(param_dtype=torch.float16), "S6", "garbage", "0.weight"),
    "parameter-dict": (Aside, ShardConfig(), "S8", "ParameterDict", "magnitudes.layers_0"),
    "unmaterialised": (unmaterialised, ShardConfig(), "D6", "meta", "layers.1.mlp.up_proj.magnitude"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_configuration_is_found(name: str) -> None:
    """The finding names parameter, clause, consequence and mend, and training is not let through."""
    build, shard, clause, consequence, parameter = PLANTED[name]

    report = preflight(build(), shard)

    (finding, *_) = [f for f in report.findings if f.clause == clause and consequence in f.consequence]
    assert parameter in finding.parameter
    assert finding.mend
    assert not report.ok


@pytest.mark.parametrize("kind", ["f32", "bf16", "nf4"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2", "ddp", "hsdp"])
def test_our_own_units_pass(strategy: str, kind: str) -> None:
    """What apply_dora and shard_model make has no error and no warning, under any strategy."""
    report = preflight(llama.build(kind), ShardConfig(strategy=strategy), world_size=2)

    assert [f for f in report.findings if f.level != "note"] == []


REFUSED: dict[str, tuple[str, DoraConfig, ShardConfig, str]] = {
    "storage": (
        "S6",
        DoraConfig(4, 8, quant="nf4"),
        ShardConfig(param_dtype=torch.float16),
        "quant_storage torch.bfloat16 against param_dtype torch.float16",
    ),
    "integers": ("S7", DoraConfig(4, 8, quant=QuantConfig(quant_storage=torch.uint8)), ShardConfig("fsdp1"), "uint8"),
    "changed-weight": ("D6", DoraConfig(4, 8), ShardConfig(param_dtype=torch.bfloat16), "would not be its magnitudes"),
    "rank": ("D1", DoraConfig(49, 8), ShardConfig(), "larger than both"),
    "replicas": ("T1", DoraConfig(4, 8), ShardConfig("none"), "a model of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_shard_model_would_refuse_is_found_from_shapes(name: str) -> None:
    """From a meta model alone, with the clause."""
    clause, dora, shard, part = REFUSED[name]

    report = preflight(on_meta(**SMALL), shard, dora=dora)

    assert [f.clause for f in report.findings if f.level == "error" and part in f.consequence] == [clause]


def test_t1_more_tokens_than_positions_are_found() -> None:
    """A sequence that the model has no position for ends a run at its first step."""
    report = preflight(on_meta(**SMALL, max_position_embeddings=16), ShardConfig(), dora=DoraConfig(4, 8), seq_len=17)

    assert [f.clause for f in report.findings if f.level == "error"] == ["T1"]


def configured(folder: Path, **changed: object) -> list[str]:
    """The words of a preflight of a small model's configuration."""
    config = LlamaConfig(**SMALL, **HEADS).to_dict()
    (folder / "config.json").write_text(json.dumps(config | changed))
    return ["preflight", "--model", str(folder / "config.json"), "--world-size", "2", "--strategy", "fsdp1"]


def test_c2_packed_checkpoints_are_judged_as_they_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that bitsandbytes has packed as uint8 can't lie in a flat parameter, without --quant as well."""
    words = configured(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    assert main(words) == 1
    assert "uint8 bytes can't lie in a flat parameter" in capsys.readouterr().out


WRONG = {
    "no-ranks": (["--world-size", "0"], {}, "--world-size 0 is below 1"),
    "no-sequence": (["--batch-size", "0"], {}, "--batch-size 0 is below 1"),
    "fewer-than-no-tokens": (["--seq-len", "-5"], {}, "--seq-len -5 is below 0"),
    "nowhere": (["--json", "/nowhere/report.json"], {}, "--json /nowhere/report.json can't be written"),
    "misspelt": (["--target-modules", "q_proj,typo"], {}, "'typo' matches nothing"),
    "gptq": ([], {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised by gptq"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_judged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The option and its value, exit status 2."""
    words, changed, line = WRONG[name]

    assert main([*configured(tmp_path, **changed), *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert line in said[0]


def test_s7_weights_tied_across_units_are_found() -> None:
    """A weight that two blocks share belongs to neither's unit."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[1].weight = model[0].weight

    report = preflight(model, ShardConfig())

    assert [(f.clause, f.parameter) for f in report.findings if f.level == "error"] == [("S7", "1.weight")]


def test_d11_half_precision_adapters_are_warned_of() -> None:
    """PEFT's adapters cast to bf16 lose small updates."""
    report = preflight(peft_dora(torch.bfloat16).to(torch.bfloat16), ShardConfig())

    assert [f.level for f in report.findings if f.clause == "D11"] == ["warning"]


def test_s1_empty_shards_are_noted() -> None:
    """At a rank of 3 and a world of 8 five ranks hold no row of A: right, and said."""
    report = preflight(llama.build("f32"), ShardConfig(), world_size=8)

    assert any("5 of 8 ranks hold no row" in f.consequence for f in report.findings)
    assert report.ok


def test_s1_traffic_that_is_mostly_padding_is_warned_of() -> None:
    """A and the norms of a small model are padded to a row a rank at a world of 4096; a flat parameter is not."""
    model, dora = on_meta(**SMALL), DoraConfig(4, 8)

    reports = [preflight(model, ShardConfig(s), world_size=4096, dora=dora) for s in ("fsdp2", "fsdp1")]

    assert [[f.clause for f in r.findings if f.level == "warning"] for r in reports] == [["S1"], []]


Q_K_V_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
PAPER = {  # (hidden, intermediate, blocks, vocabulary, key heads), and DoRA's table 1: LoRA, DoRA at 32, DoRA at 16
    "llama-7b": ((4096, 11008, 32, 32000, 32), (0.83, 0.84, 0.43)),
    "llama-13b": ((5120, 13824, 40, 32000, 40), (0.67, 0.68, 0.35)),
    "llama3-8b": ((4096, 14336, 32, 128256, 8), (0.70, 0.71, 0.35)),
}
PRINTED = 0.015
"""Per cent: one and a half units of the last printed digit (0.361 is printed as 0.35)."""


@pytest.mark.parametrize("name", PAPER)
def test_trainable_share_is_the_papers(name: str) -> None:
    """LoRA at rank 32, DoRA at 32 and DoRA at 16 train the percentages that the DoRA paper prints."""
    (hidden, intermediate, blocks, vocabulary, key_heads), printed = PAPER[name]
    model = on_meta(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=key_heads,
    )
    configs = [DoraConfig(r, 2 * r, Q_K_V_UP_DOWN, method=m) for r, m in ((32, "lora"), (32, "dora"), (16, "dora"))]

    plans = [preflight(model, ShardConfig(), dora=config).plan for config in configs]

    got = [100 * plan.trainable / plan.total for plan in plans]
    assert max(abs(g - p) for g, p in zip(got, printed, strict=True)) <= PRINTED


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["f32", "nf4"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s1_s2_counted_shards_are_the_real_ones(pools: Pools, strategy: str, kind: str) -> None:
    """Elements that a rank holds, counted from the meta model, are those that torch gives it; so are the buffers."""
    answers = pools.run(2, "shapes:held", strategy=strategy, kind=kind)

    assert [held for held, _ in answers] == [counted for _, counted in answers]


@pytest.mark.distributed
@pytest.mark.parametrize("again", [True, False], ids=["gathered-again", "kept"])
@pytest.mark.parametrize("kind", ["f32", "nf4"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s3_counted_bytes_are_those_sent(pools: Pools, strategy: str, kind: str, again: bool) -> None:
    """What a step's gathers and reductions send is what was counted, byte for byte."""
    answers = pools.run(2, "shapes:sent", strategy=strategy, kind=kind, again=again)

    assert [real for real, _ in answers] == [counted for _, counted in answers]


PEFT_FAILS = {
    "blocks": ("bfloat16", False, False, "uniform dtype"),
    "blocks-orig": ("bfloat16", False, True, "uniform dtype"),
    "frozen-beside-trainable": ("float32", False, False, "uniform `requires_grad`"),
    "own-policy-orig": ("float32", True, True, "tuple index out of range"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", PEFT_FAILS)
def test_what_is_found_of_peft_is_what_happens(pools: Pools, name: str) -> None:
    """FSDP1 fails on PEFT's DoRA as the findings say."""
    base, leaves, original, message = PEFT_FAILS[name]
    strategy = "fsdp1-orig" if original else "fsdp1"

    said = pools.run(2, "shapes:peft_fails", base=base, leaves=leaves, original=original)
    found = [
        finding.consequence for finding in preflight(peft_dora(getattr(torch, base)), ShardConfig(strategy)).findings
    ]

    assert all(message in text for text in said)
    assert any(message in text or (leaves and "IndexError" in text) for text in found)


def test_405b_on_16384_ranks_in_a_gigabyte(tmp_path: Path) -> None:
    """The command answers from a config.json alone, under every strategy, in bounded memory."""
    config = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    flags = ["--quant", "nf4", "--rank", "16", "--world-size", "16384", "--json", str(tmp_path / "report.json")]
    flags += ["--seq-len", "8192"]
    command = [sys.executable, "-m", "torch_impl", "preflight", "--model", str(tmp_path / "config.json"), *flags]

    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - our own command

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] > 0
    assert 2**20 < report["memory_over_imports"] < 2**30  # a report of shapes takes a few MiB, not none
    assert report["strategies"][0]["parameters"]["total"] > 405e9
    assert report["strategies"][0]["bytes"]["activations"] > 126 * 8192 * 16384
