"""It learns: one process and two ranks give one curve, to the bit, and the tool that says so can say otherwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learning_curves import METHODS, PLACES, Options, Run, main, read, shortfalls
from ranks import Pools
from small import write_model, write_text

FLAGS = {"--method": "method", "--quant": "quant", "--accumulate": "accumulate"}


def as_options(words: tuple[str, ...]) -> dict[str, str | int]:
    """The tool's words as the options that they are."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return {FLAGS[flag]: int(value) if value.isdigit() else value for flag, value in pairs}


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_s3_one_process_and_two_ranks_train_the_same_bits(pools: Pools, tmp_path: Path, method: str) -> None:
    """The tool's runs on a small network in pools of ranks: six AdamW steps, losses and adapters equal."""
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    common = {"model": tmp_path / "model", "data": tmp_path / "text.txt", "steps": 6, "seq_len": 24, "lr": 1e-2}
    runs = []
    for strategy, world, more in PLACES.values():
        chosen = {"strategy": strategy, "out": tmp_path / strategy} | as_options((*METHODS[method], *more))
        assert set(pools.run(world or 1, "runs:train", options=common | chosen)) == {""}
        runs.append(read(tmp_path / strategy))

    assert all(run.losses == runs[0].losses for run in runs)
    assert all(torch.equal(run.adapter[name], runs[0].adapter[name]) for run in runs for name in runs[0].adapter)


def made() -> dict[tuple[str, str], Run]:
    """Runs that show all they should."""
    falls = {"LoRA": (5.0, 3.0, 2.0, 1.0), "DoRA": (5.0, 3.0, 2.0, 0.5)}
    falls |= {"QLoRA": (6.0, 3.0, 2.0, 1.0), "QDoRA": (6.0, 3.0, 2.0, 0.5)}
    return {
        (m, p): Run(losses, {"A": torch.ones(3), "B": torch.ones(2)}) for m, losses in falls.items() for p in PLACES
    }


def changed(
    place: tuple[str, str], losses: tuple[float, ...] | None = None, **adapter: torch.Tensor
) -> Callable[[], dict[tuple[str, str], Run]]:
    """The same with one run changed."""

    def make() -> dict[tuple[str, str], Run]:
        runs = made()
        runs[place] = Run(losses or runs[place].losses, {**runs[place].adapter, **adapter})
        return runs

    return make


ONE_ULP = 1.0 + 2.0**-52
PLANTED = {
    "one-ulp-of-a-loss": (
        changed(("LoRA", "fsdp1 on 2"), (5.0, 3.0, 2.0, ONE_ULP)),
        "1 losses differ, first at step 4",
    ),
    "a-step-too-few": (changed(("DoRA", "fsdp2 on 2"), (5.0, 3.0, 2.0)), "3 losses against 4"),
    "one-element": (changed(("QLoRA", "fsdp2 on 2"), B=torch.tensor([1.0, 1.0000001])), "1 of 2 tensors"),
    "another-tensor": (changed(("QLoRA", "fsdp2 on 2"), C=torch.ones(1)), "other tensors: ['C']"),
    "no-learning": (changed(("LoRA", "one process"), (5.0, 5.0, 5.0, 5.0)), "the loss doesn't fall"),
    "start": (changed(("QDoRA", "one process"), (6.5, 3.0, 2.0, 0.5)), "doesn't start where QLoRA does"),
    "silently-lora": (changed(("DoRA", "one process"), (5.0, 3.0, 2.0, 1.0)), "two methods have the same curve"),
}


def test_good_runs_fall_short_of_nothing() -> None:
    """The control of the controls."""
    assert list(shortfalls(made())) == []


@pytest.mark.parametrize("name", PLANTED)
def test_each_way_to_fall_short_is_said(name: str) -> None:
    """One changed run is enough, however small the change."""
    runs, words = PLANTED[name]

    assert any(words in text for text in shortfalls(runs()))


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_tool_trains_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve runs of the real command on a small network: status 0, a line a method, a picture."""
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    options = Options(model=tmp_path / "model", data=tmp_path / "text.txt", steps=12, seq_len=24, lr=1e-2)

    assert main(Options(**(vars(options) | {"picture": tmp_path / "curves.png"}))) == 0

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(METHODS)
    assert (tmp_path / "curves.png").stat().st_size > 1000
