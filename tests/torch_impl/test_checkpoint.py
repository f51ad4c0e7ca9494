"""Checkpoints: damaged ones are refused in one line, and a write that is cut off never shows."""

import hashlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onehot import Stack, build
from safetensors.torch import load_file
from saves import save_for_ever
from torch import nn

from torch_impl.errors import CheckpointError
from torch_impl.files import checkpoint
from torch_impl.files import checkpoint_disk as checkpoint_files


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that has stepped once."""
    model = build(Stack())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(3, 66)).sum().backward()
    optimizer.step()
    return model, optimizer


def adapters(model: nn.Module) -> list[torch.Tensor]:
    """Copies of what trains."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """One checkpoint."""
    return checkpoint.save(tmp_path, *trained(), checkpoint.Saved(1, 7, {"a": 1}))


def _rewrite(change: Callable[[bytes], bytes], pattern: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        path = next(place.glob(pattern))
        path.write_bytes(change(path.read_bytes()))

    return damage


BROKEN = {
    "truncated": (_rewrite(lambda b: b[:-1], "*.safetensors"), "is not what was written"),
    "tampered": (_rewrite(lambda b: b[:-1] + bytes([b[-1] ^ 1]), "*.safetensors"), "is not what was written"),
    "state-changed": (_rewrite(lambda b: b.replace(b'"step": 1', b'"step": 2'), "state.json"), "is not what was"),
    "no-manifest": (lambda p: (p / "manifest.json").unlink(), "can't be read"),
    "manifest-not-json": (_rewrite(lambda _: b"{", "manifest.json"), "can't be read"),
    "missing-shard": (lambda p: next(p.glob("*.safetensors")).unlink(), "can't be read"),
    "extra-pickle": (lambda p: (p / ".metadata").write_bytes(b"cos\nsystem\n"), "its manifest doesn't name"),
}


def _state(*lacking: str, **values: object) -> Callable[[Path], None]:
    """Another state.json, to which the manifest agrees."""

    def damage(place: Path) -> None:
        state, manifest = (json.loads((place / name).read_text()) for name in ("state.json", "manifest.json"))
        content = json.dumps({key: value for key, value in (state | values).items() if key not in lacking}).encode()
        (place / "state.json").write_bytes(content)
        manifest["files"]["state.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (place / "manifest.json").write_text(json.dumps(manifest))

    return damage


BROKEN |= {
    "other-version": (_state(version=2), "is of version 2, not 1"),
    "step-a-word": (_state(step="x"), "has no step"),
    "no-groups": (_state(groups=[]), "its optimizer's groups"),
    "no-facts": (_state(facts=None), "has no facts"),
    "sizes-of-another-kind": (_state(tensors={"0.lora_A": [3]}), "doesn't fit this model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_c3_a_damaged_checkpoint_is_refused_before_anything_is_loaded(place: Path, name: str) -> None:
    """One line with the place, and the model as it was."""
    damage, words = BROKEN[name]
    damage(place)
    model, optimizer = trained()
    before = adapters(model)

    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load_(place, model, optimizer)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, adapters(model), strict=True))


def test_the_newest_is_the_one_of_most_steps(tmp_path: Path) -> None:
    """A seventh digit, and a folder that a user has put aside, change nothing."""
    for name in ("step-999999", "step-1000000", "step-old", "step-000003.bak"):
        (tmp_path / name).mkdir()

    assert checkpoint_files.newest(tmp_path) == tmp_path / "step-1000000"


@pytest.mark.parametrize("held", [["cpu", "cuda"], ["cpu"]], ids=["both", "older"])
def test_t6_every_generator_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[str]) -> None:
    """A device's generator is kept beside the processor's; what a checkpoint lacks stands where it stood."""
    device = torch.Generator().manual_seed(5)
    pairs = {"cpu": (torch.get_rng_state, torch.set_rng_state), "cuda": (device.get_state, device.set_state)}
    monkeypatch.setattr(checkpoint, "generators", lambda: {name: pairs[name] for name in held})
    run = trained()
    torch.manual_seed(6)
    place = checkpoint.save(tmp_path, *run, checkpoint.Saved(1, 7, {}))
    want = torch.rand(3), torch.rand(3, generator=device)
    if held == ["cpu"]:
        device.manual_seed(5)

    monkeypatch.setattr(checkpoint, "generators", lambda: pairs)
    checkpoint.load_(place, *(trained()))

    assert torch.equal(torch.rand(3), want[0])
    assert torch.equal(torch.rand(3, generator=device), want[1])


def test_t6_a_checkpoint_that_lists_no_generators_has_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were written before devices had theirs kept: one generator a rank, stored as `rng/RANK`."""
    monkeypatch.setattr(checkpoint, "generators", lambda: {"cpu": (torch.get_rng_state, torch.set_rng_state)})
    run = trained()
    torch.manual_seed(6)
    place = checkpoint.save(tmp_path, *run, checkpoint.Saved(1, 7, {}))
    want = torch.rand(3)
    _state("generators")(place)

    checkpoint.load_(place, *trained())

    assert torch.equal(torch.rand(3), want)
    assert [name for path in place.glob("*.safetensors") for name in load_file(path) if "rng" in name] == ["rng/0"]


def test_c3_no_pickle_is_written(place: Path) -> None:
    """A checkpoint is safetensors and JSON."""
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}


def test_another_model_is_refused(place: Path) -> None:
    """Names or sizes that differ are refused with the first of them."""
    model = build(Stack(rank=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    with pytest.raises(CheckpointError, match=r"doesn't fit this model: .*lora_A"):
        checkpoint.load_(place, model, optimizer)


def test_a_full_disk_leaves_the_earlier_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails midway is one line, and nothing else changes."""
    before = {p.name: p.read_bytes() for p in place.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "_flush", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(place.parent, *trained(), checkpoint.Saved(2, 8, {}))
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


def test_a_rank_that_cannot_write_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stopped torch's writer is told, in one line, without torch's own wrapping."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, *trained(), checkpoint.Saved(1, 7, {}))

    assert str(caught.value).startswith(
        f"no checkpoint can be written under {tmp_path}: [Errno 28] No space left on device;"
    )


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    """Where no folder can be made the line says so."""
    (tmp_path / "out").write_text("")

    with pytest.raises(CheckpointError, match="no checkpoint can be written"):
        checkpoint.save(tmp_path / "out" / "checkpoints", *trained(), checkpoint.Saved(1, 0, {}))


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_fifty_kills_while_saving_leave_fifty_loadable_checkpoints(tmp_path: Path) -> None:
    """Whenever a rank is killed in a save, the newest checkpoint is whole, and is one step's on both ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch_impl", "torch._dynamo"])
    pick = random.Random(3)  # noqa: S311 - moments, not secrets
    for attempt in range(50):
        folder = tmp_path / str(attempt)
        ours, theirs = context.Pipe()
        arguments = [(rank, str(tmp_path / f"store{attempt}"), folder, theirs) for rank in range(2)]
        ranks = [context.Process(target=save_for_ever, args=a, daemon=True) for a in arguments]
        for rank in ranks:
            rank.start()
        assert ours.poll(60)
        time.sleep(pick.uniform(0.0, 0.15))
        victim = attempt % 2
        os.kill(ranks[victim].pid, 9)
        ranks[1 - victim].join(0.05)
        ranks[1 - victim].kill()
        for rank in ranks:
            rank.join()
        newest = checkpoint_files.newest(folder)
        assert newest is not None
        model = build(Stack())
        saved = checkpoint.load_(newest, model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
        assert {float(value) for tensor in adapters(model) for value in tensor.unique()} == {float(saved.step)}
        assert json.loads((newest / "state.json").read_text())["step"] == saved.step


def test_another_optimizer_is_refused(place: Path) -> None:
    """A checkpoint of AdamW is loaded into SGD."""
    model, _ = trained()
    other = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    with pytest.raises(CheckpointError, match="was written with AdamW"):
        checkpoint.load_(place, model, other)
