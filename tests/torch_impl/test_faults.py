"""Under torchrun: lost ranks, a lost launcher, SIGTERM, hangs, restarts, unwritable places."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launched import (
    command,
    kill_beside_one_that_joins,
    kill_in_a_collective,
    kill_in_a_save,
    kill_in_the_load,
    kill_rank,
    signal_launcher,
    terminate_with_one_stopped,
    watch,
)
from safetensors.torch import load_file
from small import write_model, write_text

from torch_impl.files import checkpoint
from torch_impl.files import checkpoint_disk as checkpoint_files

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]
LONG = 100_000
"""Steps of a run that does not end by itself."""


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a run in a folder of its own."""
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")

    def make(*more: str, steps: int = LONG, out: str = "out") -> list[str]:
        return [
            *("--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / out)),
            *("--steps", str(steps), "--seq-len", "24", "--quant", "nf4", "--lr", "1e-3"),
            *(more if "--save-every" in more else ("--save-every", "5", *more)),
        ]

    return make


@dataclass(frozen=True)
class Moment:
    """When a rank is killed, and in which phase its recorder must then say it was."""

    until: str
    """The line of rank 0 to wait for; without one, until the ranks are there."""
    act: Callable[[int, Path], Callable[[int, dict[int, int]], int]]
    phase: str


MOMENTS = {
    "load": Moment("", lambda rank, _: kill_in_the_load(rank), "load"),
    "step": Moment("step 8/", lambda rank, _: kill_rank(rank), ""),
    "collective": Moment("step 3/", lambda rank, _: kill_in_a_collective(rank), ""),
    "save": Moment("step 5/", kill_in_a_save, "saving step "),
}


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(name, rank, marks=() if (name, rank) == ("save", 1) else pytest.mark.long)
        for name in MOMENTS
        for rank in (0, 1)
    ],
)
def test_a_killed_rank_ends_the_job_and_is_named_last(
    tmp_path: Path, words: Callable[..., list[str]], name: str, rank: int
) -> None:
    """Within 30 s, non-zero, the last line names rank, process and phase; nothing is left; what was saved is whole."""
    moment = MOMENTS[name]
    if name == "load":
        shutil.rmtree(tmp_path / "model")
        write_model(tmp_path / "model", hidden=1152)  # what takes a while to read and pack
    act = moment.act(rank, tmp_path / "out" / "checkpoints")
    ending = watch(words("--save-every", "1" if name == "save" else "5"), until=moment.until, act=act)(
        tmp_path / "log", world=2
    )

    assert ending.seconds < 30
    assert ending.status != 0
    assert ending.orphans == []
    last = ending.lines[-1]
    assert last.startswith(f"rank {rank} (pid {ending.victim} on ")
    assert f"was lost in {moment.phase}" in last
    place = checkpoint_files.newest(tmp_path / "out" / "checkpoints")
    assert place is None or checkpoint.read_state(place)[1].step == int(place.name.removeprefix("step-"))


@pytest.mark.long
def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    """With torchrun gone no rank lives on, and the last line says who was lost."""
    ending = watch(words(), until="step 8/", act=signal_launcher(signal.SIGKILL))(tmp_path / "log", world=2)

    assert ending.orphans == []
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith(f"the launcher (pid {ending.victim} on ")


@pytest.mark.long
def test_a_launcher_that_dies_while_ranks_are_starting_leaves_none(
    tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    """Ranks that find themselves without torchrun when they have imported torch end, and say why."""
    ending = watch(words(), until="", act=signal_launcher(signal.SIGKILL))(tmp_path / "log", world=2)

    assert ending.orphans == []
    assert "can't reach the launcher's store at" in (tmp_path / "log").read_text()


@pytest.mark.long
def test_a_rank_killed_before_it_has_begun_doesnt_keep_the_other(
    tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    """The rank that waits for it ends at torchrun's SIGTERM, and isn't itself called lost."""
    ending = watch(words(), until="", act=kill_beside_one_that_joins(1))(tmp_path / "log", world=2)

    text = "\n".join(ending.lines)
    assert ending.seconds < 20
    assert ending.status != 0
    assert "rank 0: asked to stop before it had begun" in text
    assert "was lost" not in text
    assert f"(pid: {ending.victim})" in text.rpartition("Root Cause")[2]


@pytest.mark.long
def test_sigterm_with_a_stopped_rank_names_it(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    """The rank that waits in a collective prints its stack in time, and the last line names the other."""
    ending = watch(words(), until="step 8/", act=terminate_with_one_stopped(1))(tmp_path / "log", world=2)

    text = "\n".join(ending.lines)
    assert ending.seconds < 33
    assert ending.orphans == []
    assert "after it was asked to" in text
    assert "torch_impl/training/train.py" in text
    assert ending.lines[-1].startswith(f"rank 1 (pid {ending.victim} on ")


@pytest.mark.parametrize(
    ("asked", "world"),
    [
        pytest.param(signal.SIGTERM, 2, id="SIGTERM-torchrun"),
        pytest.param(signal.SIGINT, 2, id="SIGINT-torchrun", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 0, id="SIGTERM-one-process", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 0, id="SIGINT-one-process", marks=pytest.mark.long),
    ],
)
def test_being_asked_to_stop_saves_and_ends_in_order(
    tmp_path: Path, words: Callable[..., list[str]], asked: signal.Signals, world: int
) -> None:
    """The step under way is finished and saved, with the adapter; no rank fails."""
    ending = watch(words(), until="step 7/", act=signal_launcher(asked))(tmp_path / "log", world=world)

    assert ending.seconds < 30
    assert ending.orphans == []
    assert world or ending.status == 0
    text = "\n".join(ending.lines)
    assert "adapter and checkpoint of step" in text
    assert "was lost" not in text
    assert "exitcode" not in text
    place = checkpoint_files.newest(tmp_path / "out" / "checkpoints")
    assert place is not None
    assert checkpoint.read_state(place)[1].step >= 7


def test_a_rank_without_a_launcher_does_not_train_alone(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """Told that there are two ranks, it neither waits nor takes their mean for its own."""
    told = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}

    done = subprocess.run(command(words(), world=0), env=told, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - ours

    assert done.returncode == 2
    assert done.stderr == "error: WORLD_SIZE is 2, but torchrun didn't start this: use it\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_restarted_ranks_end_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    """A rank is killed, torchrun starts all anew, and they go on from the checkpoint."""
    disturbed = watch(words(steps=20), until="step 8/", act=kill_rank(1))(tmp_path / "log", world=2, restarts=1)
    calm = watch(words(steps=20, out="calm"), until="step 20/", act=lambda *_: 0)(tmp_path / "log2", world=2)

    assert (disturbed.status, calm.status) == (0, 0)
    one, two = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("out", "calm"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.long
def test_a_hang_is_ended_with_every_ranks_phase_and_stack(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    """Rank 1 stops: past --phase-timeout rank 0 prints where it waits, names who is silent, and the job ends."""
    job = watch(words("--phase-timeout", "8"), until="step 8/", act=kill_rank(1, signal.SIGSTOP))
    ending = job(tmp_path / "log", world=2)

    assert ending.seconds < 8 + 30
    assert ending.status != 0
    assert ending.orphans == []
    text = "\n".join(ending.lines)
    assert "past --phase-timeout 8 s" in text
    assert "torch_impl/training/train.py" in text
    assert f"rank 1 (pid {ending.victim} on " in text


@pytest.mark.long
def test_a_slow_phase_prints_every_ranks_stack(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    """A limit that no load keeps: both ranks print phase and stack, and the job ends non-zero."""
    job = watch(words("--phase-timeout", "0.05"), until="past --phase-timeout", act=lambda *_: 0)
    ending = job(tmp_path / "log", world=2)

    text = "\n".join(ending.lines)
    assert ending.status != 0
    assert all(f"rank {rank}: in " in text for rank in range(2))


def test_an_unwritable_place_is_one_line(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    """--out below a file: the error line names it, and the job ends non-zero without a traceback of ours."""
    (tmp_path / "out").write_text("a file")
    ending = watch(words(), until="error: ", act=lambda *_: 0)(tmp_path / "log", world=2)

    assert ending.status != 0
    assert len([line for line in ending.lines if line.startswith("error: ")]) == 1
    assert "torch_impl/training/train.py" not in "\n".join(ending.lines)


@pytest.mark.long
@pytest.mark.parametrize("wrong", [("--alpha", "0"), ("--rank", "many")], ids=["value", "word"])
def test_bad_usage_is_said_once_whoever_is_first(
    tmp_path: Path, words: Callable[..., list[str]], wrong: tuple[str, str]
) -> None:
    """Torchrun ends the others when a rank ends: rank 0, here the slower one, still says what is wrong."""

    def act(_: int, ranks: dict[int, int]) -> int:
        os.kill(ranks[0], signal.SIGSTOP)
        time.sleep(8)
        os.kill(ranks[0], signal.SIGCONT)
        return ranks[0]

    ending = watch(words(*wrong), until="", act=act)(tmp_path / "log", world=2)

    text = "\n".join(ending.lines)
    assert ending.status != 0
    assert text.count("alpha 0.0 gives no usable scaling" if wrong[0] == "--alpha" else "Error parsing --rank") == 1


def test_a_reader_that_goes_away_is_one_line(words: Callable[..., list[str]]) -> None:
    """As under `train ... | head -1`: no traceback."""
    with subprocess.Popen(  # noqa: S603 - our own words
        command(words(), world=0),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as job:
        job.stdout.readline()
        job.stdout.close()
        said = job.stderr.read().splitlines()

    assert job.returncode == 1
    assert [line for line in said if "error" in line.lower()] == [said[-1]]
    assert said[-1].startswith("error: nothing reads the standard output")
