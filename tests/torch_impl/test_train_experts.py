"""`train` on a gpt-oss: experts beside attention, saved, resumed, exported and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from safetensors.torch import load_file
from small import write_model, write_text

from torch_impl.__main__ import main

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:peft has no DoRA on:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PREFIX = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and text."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    write_model(folder / "model", kind="gpt-oss")
    write_text(folder / "text.txt")
    return folder


def trained(pools: Pools, source: Path, out: Path, *, stopped: bool = False, **changed: Any) -> dict[str, torch.Tensor]:
    """The adapter that a run of two ranks leaves; `stopped` runs go on after their second step."""
    options = {
        "model": source / "model", "data": source / "text.txt", "out": out, "steps": 4, "batch_size": 2, "seq_len": 24,
        "lr": 1e-2, "rank": 3, "packing": False, "target_modules": "q_proj",
        "target_parameters": "gate_up_proj,down_proj",
    } | changed  # fmt: skip
    if stopped:
        assert pools.run(2, "runs:train", options=options, stop_after=2) == ["", ""]
        options["resume"] = True
    assert pools.run(2, "runs:train", options=options) == ["", ""]
    return load_file(out / "adapter" / "adapter_model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names, the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_t6_experts_resume_to_the_bit_and_are_exported(pools: Pools, source: Path, tmp_path: Path) -> None:
    """Stopped, and gone on with, in four bits; the last checkpoint holds what the run saved."""
    whole = trained(pools, source, tmp_path / "whole", quant="nf4")

    cut = trained(pools, source, tmp_path / "cut", quant="nf4", stopped=True)

    assert equal(whole, cut)
    assert whole[f"{PREFIX}.lora_magnitude_vector"].shape == (5, 16)
    assert whole[f"{PREFIX}.base_layer.lora_magnitude_vector"].shape == (5, 48)
    assert main(["export", "--run", str(tmp_path / "cut"), "--out", str(tmp_path / "exported")]) == 0
    assert equal(load_file(tmp_path / "exported" / "adapter_model.safetensors"), whole)


def test_s3_experts_train_alike_under_fsdp_and_ddp(pools: Pools, source: Path, tmp_path: Path) -> None:
    """Bit for bit, with activations computed again."""
    whole = trained(pools, source, tmp_path / "ddp", strategy="ddp")

    cut = trained(pools, source, tmp_path / "cut", strategy="fsdp2", checkpoint_activations=True)

    assert equal(whole, cut)
