"""`train` on a GPT-2: its embedding and Conv1Ds, under dropout (the adapter's and the model's own)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from safetensors.torch import load_file
from small import write_model, write_text

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and text."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_model(folder / "model", kind="gpt2")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def trained(pools: Pools, source: Path, tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """The adapter that a run of two ranks leaves; `stopped` runs go on after their second step."""

    def run(name: str, *, stopped: bool = False, **changed: Any) -> dict[str, torch.Tensor]:
        options = {
            "model": source / "model", "data": source / "text.txt", "out": tmp_path / name, "steps": 3,
            "batch_size": 2, "seq_len": 24, "lr": 1e-2, "rank": 3, "packing": False,
            "target_modules": "wte,c_attn,c_fc,c_proj", "dropout": 0.2,
        } | changed  # fmt: skip
        if stopped:
            assert pools.run(2, "runs:train", options=options, stop_after=2) == ["", ""]
            options["resume"] = True
        assert pools.run(2, "runs:train", options=options) == ["", ""]
        return load_file(options["out"] / "adapter" / "adapter_model.safetensors")

    return run


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names, the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s3_every_strategy_trains_what_replicas_train(
    trained: Callable[..., dict[str, torch.Tensor]], strategy: str
) -> None:
    """With each rank's masks its own, three AdamW steps give DDP's adapter, bit for bit; without dropout another."""
    whole, cut = trained("ddp", strategy="ddp"), trained("cut", strategy=strategy)

    assert equal(whole, cut)
    assert whole.keys() >= {f"base_model.model.transformer.wte.lora_embedding_{leaf}" for leaf in "AB"}
    assert not equal(whole, trained("undropped", strategy="ddp", dropout=0.0))


def test_t6_a_resumed_run_draws_the_masks_of_one_never_stopped(
    trained: Callable[..., dict[str, torch.Tensor]],
) -> None:
    """Each rank's generator goes on where it stopped."""
    assert equal(trained("whole", steps=4), trained("cut", steps=4, stopped=True))


def test_t5_recomputed_blocks_draw_the_same_masks(trained: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Activation checkpointing changes no bit of a run with dropout."""
    assert equal(trained("kept", checkpoint_activations=False), trained("lean", checkpoint_activations=True))
