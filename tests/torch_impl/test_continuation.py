"""A run goes on from what is its own: what else has changed is said or refused, and nothing is overwritten."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Pools
from runs import adapter, equal, losses

pytestmark = pytest.mark.distributed


def forget(place: Path, *names: str) -> None:
    """Take options out of a checkpoint, and make its manifest agree."""
    state, manifest = (json.loads((place / name).read_text()) for name in ("state.json", "manifest.json"))
    for name in names:
        del state["facts"]["options"][name]
    (place / "state.json").write_text(json.dumps(state))
    content = (place / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (place / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_older_than_an_option_resumes(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """What its options lack counts as the default, whose run it was."""
    whole, cut = options("whole", steps=4), options("cut", steps=4)
    pools.run(2, "runs:train", options=whole)
    pools.run(2, "runs:train", options=cut, stop_after=2)
    place = cut["out"] / "checkpoints" / "step-000002"
    forget(place, "dropout", "rank_stabilized")

    assert pools.run(2, "runs:train", options=cut | {"resume": True}) == ["", ""]
    assert equal(adapter(cut), adapter(whole))


SAID = {
    "weight_decay": ({"weight_decay": 0.5}, "weight_decay (0.0 -> 0.5)"),
    "batch_size": ({"batch_size": 1}, "batch_size (2 -> 1)"),
    "dropout": ({"dropout": 0.1}, "dropout (0.0 -> 0.1)"),
    "eval_fraction": ({"eval_fraction": 0.2}, "eval_fraction (0.0 -> 0.2)"),
    "strategy": ({"strategy": "ddp"}, "strategy (fsdp2 -> ddp)"),
    "nothing": ({"checkpoint_activations": True}, ""),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_resumed_run_has_changed_is_said(
    pools: Pools, options: Callable[..., dict[str, Any]], name: str
) -> None:
    """Every option that reaches a number of the run is named with both values; the others aren't."""
    changed, words = SAID[name]
    run = options()
    pools.run(1, "runs:train", options=run)

    (said,) = pools.run(1, "runs:said", options=run | {"resume": True} | changed)

    assert [line for line in said if line.startswith("changed since")] == (
        [f"changed since step-000003: {words}; the run isn't the one it continues"] if words else []
    )


def test_a_changed_weight_decay_is_used(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """What the resumed run is told counts, not what the checkpoint's optimizer had."""
    adapters = []
    for decay in (0.0, 0.5):
        run = options(str(decay), steps=4)
        pools.run(1, "runs:train", options=run, stop_after=2)
        pools.run(1, "runs:train", options=run | {"resume": True, "weight_decay": decay})
        adapters.append(adapter(run))

    assert not equal(*adapters)


def test_other_weights_of_the_same_size_are_another_model(
    pools: Pools, options: Callable[..., dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    """The magnitudes belong to the weights that they were made from."""
    shutil.copytree(source / "model", tmp_path / "model")
    run = options(model=tmp_path / "model")
    pools.run(1, "runs:train", options=run)
    path = min((tmp_path / "model").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    (said,) = pools.run(1, "runs:train", options=run | {"resume": True})

    assert "was made with another model" in said


def test_a_folder_that_another_run_writes_is_refused(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """Two runs in one folder would remove each other's half-written checkpoints."""
    run = options()
    run["out"].mkdir()
    held = os.open(run["out"], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    (said,) = pools.run(1, "runs:train", options=run)
    os.close(held)

    assert said.startswith("OptionError: another run is writing --out")
    assert pools.run(1, "runs:train", options=run) == [""]


def test_an_adapter_without_checkpoints_is_not_overwritten(
    pools: Pools, options: Callable[..., dict[str, Any]]
) -> None:
    """Whoever has removed the checkpoints keeps what was trained."""
    run = options()
    pools.run(1, "runs:train", options=run)
    shutil.rmtree(run["out"] / "checkpoints")

    for resume in (False, True):
        assert "holds an adapter and no checkpoint" in pools.run(1, "runs:train", options=run | {"resume": resume})[0]


def test_damaged_metrics_lose_their_end_alone(pools: Pools, options: Callable[..., dict[str, Any]]) -> None:
    """A line cut off, or bytes that are no text, end what is kept; the run goes on behind it."""
    run = options()
    pools.run(1, "runs:train", options=run)
    with (run["out"] / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "loss"\xff')

    assert pools.run(1, "runs:train", options=run | {"resume": True, "steps": 4}) == [""]
    assert len(losses(run)) == 4
