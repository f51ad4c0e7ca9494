"""S5, T2 and the schedule; options that can't be honoured."""

import dataclasses
import json
import math
import mmap
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from onehot import Stack, build
from ranks import Pools
from torch import nn

from torch_impl import memory
from torch_impl.__main__ import main
from torch_impl.errors import DoraError, OptionError, TrainingStoppedError
from torch_impl.training import optim
from torch_impl.training.options import TrainOptions, from_file


def options(**changed: object) -> TrainOptions:
    """Options that nothing is wrong with, but for what is changed."""
    return TrainOptions(**({"model": Path("m"), "data": Path("d.txt"), "out": Path("o")} | changed))


def test_t2_clip_is_torchs() -> None:
    """Unsharded, clipped gradients are those of clip_grad_norm_, to one rounding of the coefficient's."""
    ours, theirs = build(Stack()), build(Stack())
    for model in (ours, theirs):
        torch.manual_seed(1)
        model(torch.randn(4, 66)).sum().backward()
    norm = optim.squared_norm(optim.gradients(ours)) ** 0.5
    optim.clip(ours, norm=norm, limit=0.5)
    torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], 0.5)

    # torch sums squares in float32: its norm is off by a few ulps, ours by none
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=16 * torch.finfo(torch.float32).eps, atol=0.0)
    assert optim.squared_norm(optim.gradients(ours)) ** 0.5 == pytest.approx(0.5, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2", "hsdp", "ddp"])
def test_s5_the_norm_is_taken_once_over_all_shards(pools: Pools, strategy: str) -> None:
    """On every rank of every strategy the norm is that of the unsharded mean gradient."""
    answers = pools.run(4, "runs:norm", strategy=strategy)

    # the two gradients are float32 sums of four terms in different orders
    assert [n for n, _ in answers] == pytest.approx([w for _, w in answers], rel=4 * torch.finfo(torch.float32).eps)
    assert len({n for n, _ in answers}) == 1


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    """Linear, then half a cosine; or constant."""

    def rates(schedule: str) -> list[float]:
        return [optim.learning_rate(s, peak=1.0, steps=8, warmup=3, schedule=schedule) for s in range(8)]

    assert rates("constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates("cosine")[:4] == [0.25, 0.5, 0.75, 1]
    assert rates("cosine")[7] == 0.5 * (1 + math.cos(0.8 * math.pi))


BAD = {
    "steps": (0, "--steps 0 is below 1"),
    "lr": (math.nan, "--lr nan is no positive number"),
    "seq_len": (1, "--seq-len 1 is below 2"),
    "eval_fraction": (1.5, "not in"),
    "alpha": (0.0, "alpha 0.0"),
    "rank": (0, "rank 0"),
    "clip_norm": (-1.0, "--clip-norm -1.0 is below 0"),
    "weight_decay": (math.inf, "--weight-decay inf is below 0, or no finite number"),
    "seed": (2**70, "is beyond 64 bits"),
    "shard_size": (2, "--shard-size 2 needs replicas"),
    "eval_every": (1, "--eval-every 1 has nothing to read"),
    "target_modules": ("q_proj,", "'q_proj,' has an empty name"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_line(name: str) -> None:
    """The option, its value and the mend, before anything loads."""
    value, words = BAD[name]

    with pytest.raises(DoraError, match=words):
        options(**{name: value})


def test_a_runs_own_file_is_its_options(tmp_path: Path) -> None:
    """What run.json holds reads back as the options that were written."""
    made = options(steps=7, resume=True, packing=False, strategy="hsdp", shard_size=2)
    (tmp_path / "run.json").write_text(json.dumps(made.to_json()))

    assert TrainOptions(**from_file(tmp_path / "run.json")) == made
    assert dataclasses.asdict(made)["steps"] == 7


@pytest.mark.parametrize("content", ['{"stepz": 3}', '{"model": 5}', '{"rank": "8"}', '{"resume": 1}', "[]"])
def test_a_file_of_other_things_is_refused(tmp_path: Path, content: str) -> None:
    """A misspelt option, or a value of another kind, isn't dropped in silence."""
    (tmp_path / "run.json").write_text(content)

    with pytest.raises(OptionError, match=r"run\.json"):
        from_file(tmp_path / "run.json")


def test_names_between_commas_may_have_spaces() -> None:
    """A space after a comma is not part of the next name."""
    assert options(target_modules="q_proj, k_proj").dora.target_modules == ["q_proj", "k_proj"]


USAGE = [
    ["train", "--config", "absent.json"],
    ["train", "--config=absent.json"],
    ["train", "--config"],
    ["nothing"],
    [],
]


@pytest.mark.parametrize("words", USAGE, ids=str)
def test_usage_is_exit_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong word is one line on stderr and status 2."""
    assert main(words) == 2
    assert len((capsys.readouterr().err or "usage").splitlines()) == 1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, which has nobody to add its numbers to."""
    monkeypatch.setattr(optim, "reduced", lambda values, **_: tuple(values))


def trained_once(bad: float = 1.0) -> nn.Module:
    """A model with gradients, the first of which is multiplied by `bad`."""
    model = build(Stack())
    model(torch.randn(4, 66)).sum().backward()
    next(p for p in model.parameters() if p.grad is not None).grad.mul_(bad)
    return model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("loss", "norm"),
    [(0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)],
    ids=str,
)
def test_no_step_is_made_from(loss: float, norm: float) -> None:
    """A step is made from a loss or a gradient that is not finite, or from neither loss nor gradient."""
    model = trained_once()

    with pytest.raises(TrainingStoppedError, match="step 3: "):
        optim.refuse_useless(model, step=3, loss=loss, norm=norm)


@pytest.mark.parametrize(("loss", "norm"), [(0.0, 1.0), (1.0, 0.0)], ids=str)
def test_a_step_is_made_where_only_one_is_zero(loss: float, norm: float) -> None:
    """A loss of 0 that has a gradient stops the run, or a loss without one (all-zero gradients need not stay so)."""
    optim.refuse_useless(trained_once(), step=3, loss=loss, norm=norm)


@pytest.mark.usefixtures("alone")
def test_the_parameter_that_is_not_finite_is_named() -> None:
    """The message names another parameter than the one whose gradient is infinite, or more."""
    model = trained_once(math.inf)
    (name, *_) = [name for name, p in model.named_parameters() if p.grad is not None]

    with pytest.raises(TrainingStoppedError) as caught:
        optim.refuse_useless(model, step=3, loss=1.0, norm=math.inf)

    assert f"not finite: {name};" in str(caught.value)


@pytest.mark.parametrize(("count", "text"), [(4, "a, b, c, d"), (6, "a, b, c, d and 2 more")])
def test_four_names_are_said_and_the_others_counted(count: int, text: str) -> None:
    """Of four names one is left out, or of six the two others are not counted."""
    assert optim._some(list("abcdef")[:count]) == text


def test_the_peak_of_memory_outlives_what_was_freed() -> None:
    """Now and at most are two numbers: the second keeps 64 MiB that the first has given back, but for pages."""
    size = 2**26
    held = mmap.mmap(-1, size)  # its own pages: malloc might take and keep a hole of its heap
    held.write(b"1" * size)
    full = memory.host_memory(peak=False)
    held.close()

    now, most = (memory.host_memory(peak=peak) for peak in (False, True))
    assert now < full - size // 2 < most


def test_a_gpu_tells_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory is not what a model on a GPU takes."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.type == "cuda" else 0)

    assert memory.peak_memory(torch.device("cuda")) == 7


@pytest.mark.parametrize(("platform", "peak"), [("freebsd14", 3072), ("darwin", 3)])
def test_memory_is_told_in_bytes_without_proc(monkeypatch: pytest.MonkeyPatch, platform: str, peak: int) -> None:
    """Where the system has no count of its own: `getrusage` counts in kibibytes, but on macOS in bytes."""
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3))

    assert memory.host_memory(peak=True) == peak
