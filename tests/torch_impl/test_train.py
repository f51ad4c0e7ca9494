"""`train` in a pool of ranks: strategies agree, resumption is bitwise, what must stop a run stops it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Pools
from runs import adapter, equal, losses, values, whole_tensors

pytestmark = pytest.mark.distributed
SHARDED = ["fsdp1", "fsdp1-orig", "fsdp2", "hsdp"]


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_s3_every_strategy_trains_the_adapter_that_replicas_train(
    pools: Pools, options: Callable[..., dict[str, Any]], strategy: str, quant: str
) -> None:
    """After three AdamW steps on unequal token counts each strategy's adapter is DDP's, bit for bit."""
    whole, cut = options("ddp", strategy="ddp", quant=quant), options("cut", strategy=strategy, quant=quant)
    for each in (whole, cut):
        assert pools.run(2, "runs:train", options=each) == ["", ""]

    assert equal(adapter(whole), adapter(cut))
    # equal gradients, whose squares are summed in float64 in other orders
    assert values(cut, "norm") == pytest.approx(values(whole, "norm"), rel=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("strategy", [*SHARDED, "ddp"])
def test_t6_a_resumed_run_is_the_run_that_was_never_stopped(
    pools: Pools, options: Callable[..., dict[str, Any]], strategy: str
) -> None:
    """Stopped after two of four steps by one rank's SIGTERM and resumed: the same losses, adapter, optimizer state."""
    world = 4 if strategy == "hsdp" else 2  # two replicas of two shards
    whole = options("whole", strategy=strategy, steps=4, accumulate=2, clip_norm=0.1)
    cut = whole | {"out": whole["out"].with_name("cut")}
    pools.run(world, "runs:train", options=whole)
    pools.run(world, "runs:train", options=cut, stop_after=2)
    assert [p.name for p in (cut["out"] / "checkpoints").iterdir()] == ["step-000002"]
    assert pools.run(world, "runs:train", options=cut | {"resume": True}) == [""] * world

    assert losses(cut) == losses(whole)
    assert equal(adapter(cut), adapter(whole))
    places = [each["out"] / "checkpoints" / "step-000004" for each in (cut, whole)]
    assert equal(*map(whole_tensors, places))


@pytest.mark.parametrize("strategy", SHARDED)
def test_s12_a_checkpoint_loads_at_any_world_size_bit_for_bit(
    pools: Pools, options: Callable[..., dict[str, Any]], strategy: str
) -> None:
    """Written by two ranks (hsdp: four), what one and three ranks hold after loading are its ranges."""
    run = options(strategy=strategy, quant="nf4")
    pools.run(4 if strategy == "hsdp" else 2, "runs:train", options=run)
    place = run["out"] / "checkpoints" / "step-000003"

    for world in (1, 2, 3):
        assert pools.run(world, "runs:reloaded", options=run, place=place, strategy=strategy) == [[]] * world


def test_s12_two_ranks_then_one_then_three_go_on_with_the_same_data(
    pools: Pools, options: Callable[..., dict[str, Any]]
) -> None:
    """With the batch of all ranks kept, each step predicts the same tokens, and the losses agree to their rounding."""
    whole = options("whole", steps=6, batch_size=6)
    pools.run(1, "runs:train", options=whole)
    moved = options("moved", steps=6)
    pools.run(2, "runs:train", options=moved | {"batch_size": 3}, stop_after=2)
    pools.run(1, "runs:train", options=moved | {"batch_size": 6, "resume": True}, stop_after=4)
    assert pools.run(3, "runs:train", options=moved | {"batch_size": 2, "resume": True}) == ["", "", ""]

    assert values(moved, "tokens") == values(whole, "tokens")
    # a loss is a float32 sum of so many terms: orders differ by at most gamma_n of it
    rounding = max(values(whole, "tokens")) * torch.finfo(torch.float32).eps
    assert max(abs(a - b) / b for a, b in zip(losses(moved), losses(whole), strict=True)) < rounding


def test_t1_accumulation_and_unequal_ranks_give_the_loss_of_one_large_batch(
    pools: Pools, options: Callable[..., dict[str, Any]]
) -> None:
    """The same eight sequences, at once or as two forwards on each of two ranks: the same token-mean loss."""
    at_once, dealt = options("once", batch_size=8, steps=1), options("dealt", batch_size=2, accumulate=2, steps=1)
    pools.run(1, "runs:train", options=at_once)
    pools.run(2, "runs:train", options=dealt)

    rounding = 8 * 24 * torch.finfo(torch.float32).eps  # gamma_n of the sum
    assert abs(losses(at_once)[0] - losses(dealt)[0]) < rounding * losses(at_once)[0]


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_t5_activation_checkpointing_changes_no_bit(
    pools: Pools, options: Callable[..., dict[str, Any]], strategy: str
) -> None:
    """Recomputed activations give the same adapter."""
    plain, lean = (options(str(on), strategy=strategy, checkpoint_activations=on) for on in (False, True))
    for each in (plain, lean):
        assert pools.run(2, "runs:train", options=each) == ["", ""]

    assert equal(adapter(plain), adapter(lean))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_lora_trains_in_the_same_units_without_a_magnitude(
    pools: Pools, options: Callable[..., dict[str, Any]], quant: str
) -> None:
    """--method lora: FSDP1 and FSDP2 agree to the bit, and the files hold no magnitude."""
    one, two = (options(s, strategy=s, method="lora", quant=quant) for s in ("fsdp1", "fsdp2"))
    for each in (one, two):
        assert pools.run(2, "runs:train", options=each) == ["", ""]

    assert equal(adapter(one), adapter(two))
    assert not any("magnitude" in name for name in adapter(one))
    assert json.loads((one["out"] / "adapter" / "adapter_config.json").read_text())["use_dora"] is False


def test_rank_0_alone_reading_gives_the_same_run(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """--load rank0 trains what --load each trains."""
    each, one = options("each", quant="nf4"), options("one", quant="nf4", load="rank0")
    for run in (each, one):
        assert pools.run(2, "runs:train", options=run) == ["", ""]

    assert equal(adapter(each), adapter(one))


def test_held_out_text_is_evaluated(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """--eval-fraction gives a loss during and after training, the same at any world size to its rounding."""
    runs = [options(str(world), eval_fraction=0.2, eval_every=2, lr=1e-9) for world in (1, 2)]
    for world, run in enumerate(runs, 1):
        pools.run(world, "runs:train", options=run)

    found = [values(run, "evaluation_loss") for run in runs]
    assert [len(each) for each in found] == [2, 2]
    assert found[0][0] == pytest.approx(found[1][0], rel=8 * 24 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("storage", ["float16", "float32", "uint8"])
def test_q3_the_storage_of_packed_bytes_changes_no_bit(
    pools: Pools, options: Callable[..., dict[str, Any]], storage: str
) -> None:
    """--quant-storage, with the wire's dtype that it allows: the same adapter as with bytes viewed as bfloat16."""
    plain, other = (options(s, quant="nf4", quant_storage=s) for s in ("bfloat16", storage))
    for each in (plain, other):
        assert pools.run(2, "runs:train", options=each) == ["", ""]

    assert equal(adapter(plain), adapter(other))


def test_tensorboard_has_what_metrics_have(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """--tensorboard: each step's loss and rate, and each evaluation, as metrics.jsonl has them in float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - slow

    run = options(tensorboard=True, eval_fraction=0.2)
    assert pools.run(2, "runs:train", options=run) == ["", ""]

    events = EventAccumulator(str(run["out"] / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "evaluation_loss"):
        assert [event.value for event in events.Scalars(name)] == [*map(np.float32, values(run, name))]


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "not finite: model.layers.0.mlp.down_proj.lora_A"), (0.0, "are all zero")],
    ids=["nan", "zero"],
)
def test_a_useless_loss_stops_every_rank_before_the_update(
    pools: Pools, options: Callable[..., dict[str, Any]], value: float, words: str
) -> None:
    """NaN on one rank, or a loss of exactly 0 with zero gradients: one line with step and parameters, on all ranks."""
    for said in pools.run(2, "runs:poisoned", options=options(), value=value):
        assert said.startswith("TrainingStoppedError: step 2: the loss is")
        assert words in said
        assert "\n" not in said


REFUSED = {
    "taken": ({}, "CheckpointError", "holds step-000003"),
    "other-rank": ({"resume": True, "rank": 2}, "CheckpointError", "made with another rank"),
    "other-quant": ({"resume": True, "quant": "nf4"}, "CheckpointError", "made with another quant"),
    "misspelt-target": ({"target_modules": "q_proj,typo", "resume": True}, "OptionError", "'typo' matches nothing"),
    "fewer-steps": ({"resume": True, "steps": 2}, "OptionError", "--steps 2 is below step-000003"),
    "alone": ({"strategy": "none"}, "OptionError", "trains each alone"),
    "no-data": ({"data": Path("absent.txt"), "resume": True}, "DataError", "absent.txt can't be read"),
    "no-model": ({"model": Path("absent"), "resume": True}, "DataError", "no tokenizer that loads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_one_line(pools: Pools, options: Callable[..., dict[str, Any]], name: str) -> None:
    """Every rank raises the same class, with the value and the mend."""
    run = options()
    pools.run(2, "runs:train", options=run)
    changed, error, words = REFUSED[name]

    for said in pools.run(2, "runs:train", options=run | changed):
        assert said.startswith(f"{error}: ")
        assert words in said
        assert "\n" not in said
