"""`watched`: ranks with unequal numbers of batches end in time, and say who left; equal ones notice nothing."""

import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from ranks import PRELOAD
from torch import distributed

from torch_impl import watched
from torch_impl.errors import OptionError
from torch_impl.training.phases import EXPIRED

LIMIT = 4.0
PATIENCE = 60.0
"""How long a rank may take to start and to end."""


def loop(rank: int, folder: Path, batches: int, loops: int, leave: Event) -> None:
    """A rank's life: so many loops of so many batches each, and then it stays until it may leave."""
    os.dup2(os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for _ in range(loops):  # each loop has keys of its own
        with watched(seconds=LIMIT) as at:
            for number in range(batches):
                at(f"step {number}")
                distributed.all_reduce(torch.ones(1))
    (folder / f"through-{rank}").touch()
    leave.wait(2 * PATIENCE)  # a rank that has left the loop still lives


def looped(folder: Path, *batches: int, loops: int) -> tuple[list[BaseProcess], Event]:
    """Two ranks with so many batches each, and what lets them leave."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    leave = context.Event()
    ranks = [
        context.Process(target=loop, args=(rank, folder, number, loops, leave), daemon=True)
        for rank, number in enumerate(batches)
    ]
    for rank in ranks:
        rank.start()
    return ranks, leave


@pytest.mark.distributed
def test_unequal_batches_end_in_time_and_say_who_left(tmp_path: Path) -> None:
    """The rank that waits for one that has left ends with its stack, within 30 s."""
    ranks, leave = looped(tmp_path, 1, 2, loops=1)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "through-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    left = time.monotonic()

    ranks[1].join(PATIENCE)
    took = time.monotonic() - left
    leave.set()

    said = (tmp_path / "said-1").read_text()
    assert ranks[1].exitcode == EXPIRED
    assert "rank 1: in step 1 for" in said
    assert f"past its limit of {LIMIT:.0f} s" in said
    assert "all_reduce" in said
    assert "rank 0 left the loop after step 0" in said
    assert took < 30  # the limit and an answer are 8


@pytest.mark.distributed
def test_equal_batches_go_through(tmp_path: Path) -> None:
    """Two loops, one after the other."""
    ranks, leave = looped(tmp_path, 2, 2, loops=2)
    leave.set()

    for rank in ranks:
        rank.join(PATIENCE)

    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert [(tmp_path / f"through-{rank}").exists() for rank in range(2)] == [True, True]


def test_one_process_needs_no_group() -> None:
    """The same loop runs unsharded."""
    with watched(seconds=60) as at:
        at("step 0")


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(seconds: float) -> None:
    """Nothing would ever end."""
    with pytest.raises(OptionError, match="is no positive number"), watched(seconds=seconds):
        pass
