"""S12, C3, C4: checkpoints that load bit for bit at any world size, and are whole or not there."""

import errno
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Pools
from safetensors import safe_open
from saves import save_for_ever, small, whole

from torch_impl import checkpoint
from torch_impl.errors import CheckpointError


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategies",
    [("fsdp2", "fsdp1", "fsdp1-orig"), ("fsdp1", "fsdp2", "fsdp2"), ("fsdp1-orig", "ddp", "hsdp")],
    ids=["-".join(x) for x in [("from-fsdp2",), ("from-fsdp1",), ("from-fsdp1-orig",)]],
)
def test_s12_two_ranks_to_one_to_three(pools: Pools, tmp_path: Path, strategies: tuple[str, str, str]) -> None:
    """Parameters and moments are the same bits at every world size and under every strategy on the way."""
    folders = [str(tmp_path / str(world)) for world in (2, 1, 3)]

    two = pools.run(2, "saves:train_and_save", strategy=strategies[0], folder=folders[0])
    one = pools.run(1, "saves:load_and_save", strategy=strategies[1], folder=folders[0], onto=folders[1])
    three = pools.run(3, "saves:load_and_save", strategy=strategies[2], folder=folders[1], onto=folders[2])

    want = whole(two)
    assert {name.partition("/")[0] for name in want} == {"parameter", "optimizer:exp_avg", "optimizer:exp_avg_sq"}
    for got in (whole(one), whole(three)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.distributed
def test_t6_each_ranks_generator_goes_on(pools: Pools, tmp_path: Path) -> None:
    """At the world size that saved, every rank draws the numbers that it would have drawn."""
    want = pools.run(2, "saves:draws_saved", folder=str(tmp_path))

    assert pools.run(2, "saves:draws", folder=str(tmp_path)) == want
    assert want[0] != want[1]


@pytest.mark.distributed
def test_c3_c4_a_checkpoint_is_safetensors_and_json_of_shards(pools: Pools, tmp_path: Path) -> None:
    """No other kind of file is there, and no rank's file holds a sharded tensor whole."""
    pools.run(2, "saves:train_and_save", strategy="fsdp2", folder=str(tmp_path))

    place = checkpoint.newest(tmp_path)
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}
    sizes = json.loads((place / "state.json").read_text())["tensors"]
    for path in place.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = {name: file.get_slice(name).get_shape()[0] for name in file.keys() if name in sizes}  # noqa: SIM118
        assert all(held[name] < sizes[name] for name in held)


def _saved(folder: Path, *, step: int = 4) -> Path:
    model, optimizer = small()
    return checkpoint.save(folder, model, optimizer, checkpoint.Saved(step, 7, {"x": 1}))


def _tensors_of(place: Path) -> Path:
    return next(place.glob("*.safetensors"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one-bit": (lambda p: _flip(_tensors_of(p)), "checksum"),
    "truncated": (lambda p: _tensors_of(p).write_bytes(_tensors_of(p).read_bytes()[:-9]), "size or checksum"),
    "missing": (lambda p: _tensors_of(p).unlink(), "can't be read"),
    "changed-state": (lambda p: (p / "state.json").write_text("{}"), "checksum"),
    "no-manifest": (lambda p: (p / "manifest.json").unlink(), "can't be read"),
    "manifest-of-nothing": (lambda p: (p / "manifest.json").write_text("[]"), "can't be read"),
    "one-too-many": (lambda p: (p / "extra.pt").write_bytes(b""), "doesn't name"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """A checkpoint that is not what was written is refused, with its name, before the model is touched."""
    damage, part = DAMAGE[name]
    place = _saved(tmp_path)
    damage(place)
    model, optimizer = small()
    before = {n: p.clone() for n, p in model.named_parameters()}

    with pytest.raises(CheckpointError, match=part) as error:
        checkpoint.load_(place, model, optimizer)
    assert place.name in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    """SGD's state isn't AdamW's."""
    model, _ = small()
    place = _saved(tmp_path)

    with pytest.raises(CheckpointError, match="AdamW"):
        checkpoint.load_(place, model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


@pytest.mark.parametrize("stage", ["_write_tensors", "_finish"])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Where a save fails the one before it is whole, nothing half-written stays, and it is said in one line."""
    first = _saved(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, stage, fails)

    with pytest.raises(CheckpointError, match="No space left"):
        _saved(tmp_path, step=5)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert checkpoint.read_state(first)[1].step == 4


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """One line, no traceback."""
    (tmp_path / "checkpoints").write_text("")

    with pytest.raises(CheckpointError, match="no checkpoint can be written"):
        _saved(tmp_path / "checkpoints")


def _kill_while_saving(folder: Path, *, after: float) -> None:
    """Start a process that saves without end, and kill it some time after its first checkpoint."""
    process = multiprocessing.get_context("forkserver").Process(target=save_for_ever, args=(str(folder),))
    process.start()
    deadline = time.monotonic() + 60
    while checkpoint.newest(folder) is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after)
    process.kill()
    process.join()


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_a_killed_save_leaves_a_checkpoint_that_loads(tmp_path: Path, kills: int) -> None:
    """Whenever the process dies, the newest checkpoint is whole."""
    moments = random.Random(kills)  # noqa: S311 - moments, not secrets
    cut_off = 0
    for number in range(kills):
        folder = tmp_path / str(number)

        _kill_while_saving(folder, after=moments.uniform(0, 0.2))

        model, optimizer = small()
        checkpoint.load_(checkpoint.newest(folder), model, optimizer)
        cut_off += any(folder.glob(".writing-*"))
    assert cut_off > 0
