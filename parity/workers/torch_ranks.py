"""The torch ranks: a pool for each world size, kept up across cases. Loads torch in the children only."""

from __future__ import annotations

import dataclasses
import datetime as dt
import multiprocessing
import os
import time
from collections.abc import Container
from pathlib import Path
from typing import Any, Self

from parity.case import NetworkCase, RefuseCase
from parity.errors import NoAnswer
from parity.folders import own_folder
from parity.job import Job, Place, RankAnswer, declared
from parity.workers.answers import bounded, pack_answers, unpack_answers
from parity.workers.child import life, serve
from parity.workers.group import Seat, Workers, kill_fork_server
from parity.workers.memory import give_back, rank_memory
from parity.workers.refusing import what_is_said, why_refused
from parity.workers.wire import Packed

_PRELOADED = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch.distributed._composable.fsdp",
    "torch_impl",
    "bitsandbytes",
    "parity.implementations.torch_stack",
)
"""Imported once in the fork server: else each rank's first FSDP2 case costs a second, its first packed one three.

`torch_impl` before bitsandbytes, whose word on a kernel that nothing here uses it keeps off the terminal.
"""

ENVIRONMENT = {
    "MKL_CBWR": "AUTO,STRICT",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Set before torch loads: MKL's kernels must not depend on addresses, nor sums on the number of threads."""

_COLLECTIVE_SECONDS = 900
"""The process group's own limit; the pool's limit for a case is always shorter."""


class Pools:
    """One pool a world size. Use as a context manager: leaving it leaves no process behind."""

    def __init__(self, *, device: str = "cpu", model: Path | None = None) -> None:
        self._folder = own_folder()
        os.environ.update(ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": self._folder.name})  # it makes one when it loads
        self._context = multiprocessing.get_context("forkserver")
        network = ("transformers.models.llama.modeling_llama",) if model else ()
        self._context.set_forkserver_preload([*_PRELOADED, *network])
        self._options = {"device": device, "model": model}
        self._pools: dict[int, Workers] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for pool in self._pools.values():
            pool.close()
        if exception and isinstance(exception[0], type) and issubclass(exception[0], KeyboardInterrupt):
            kill_fork_server()
        self._folder.cleanup()

    def run(self, job: Job, *, seconds: float) -> list[RankAnswer]:
        """Run a job on every rank of its world.

        Raises:
            CaseFailed: a rank raised, died or hung; the message names it.
        """
        world = job.case.world
        if world not in self._pools:
            self._pools[world] = self._pool(world)
        return [answer for (answer,) in self._pools[world].call(job, _one_answer, seconds=seconds)]

    def keep(self, worlds: Container[int]) -> None:
        """End the ranks of all other worlds, which hold memory while they wait."""
        for world in [world for world in self._pools if world not in worlds]:
            self._pools.pop(world).close()

    def _pool(self, world: int) -> Workers:
        memory = rank_memory(world) if self._options["device"] == "cpu" else None  # CUDA maps its own into the process
        return Workers(rank_main, world, context=self._context, options=self._options, memory=memory)


def _one_answer(header: Any, body: bytearray, rank: int) -> list[RankAnswer]:
    """A rank speaks for itself alone.

    Raises:
        NoAnswer: what came is something else.
    """
    answers = unpack_answers(header, body, rank)
    if len(answers) != 1:
        raise NoAnswer(f"it gave {len(answers)} answers")
    return answers


@life
def rank_main(seat: Seat) -> None:
    """A rank's life: join the process group, then run jobs."""
    import torch  # noqa: PLC0415 - only a rank loads torch

    torch.set_num_threads(1)
    device = seat.options["device"]
    if device == "cuda":
        torch.cuda.set_device(seat.rank % torch.cuda.device_count())
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{seat.meeting_place}",
        rank=seat.rank,
        world_size=seat.world,
        timeout=dt.timedelta(seconds=_COLLECTIVE_SECONDS),
    )
    place = Place(seat.rank, seat.world, device, seat.options["model"])
    most_bytes = (seat.memory or rank_memory(seat.world)) // 2
    serve(seat, lambda job: _answered(job, place, most_bytes))


def _answered(job: Job, place: Place, most_bytes: int) -> Packed:
    packed = pack_answers([_run(job, place, most_bytes)])
    if isinstance(job.case, NetworkCase):
        give_back()
    return packed


def _run(job: Job, place: Place, most_bytes: int) -> RankAnswer:
    from parity.implementations.registry import resolve  # noqa: PLC0415 - loads what the subject needs, here

    start = time.monotonic()
    implementation = resolve(job.implementation)
    refused = why_refused(implementation, job.case)
    if refused:
        return RankAnswer([], time.monotonic() - start, refused)
    if isinstance(job.case, RefuseCase):
        return RankAnswer([], time.monotonic() - start, said=what_is_said(implementation, job.case))
    place = dataclasses.replace(place, folder=job.folder)
    shards = bounded(implementation.run(job.case, place), most_bytes)
    return RankAnswer(shards, time.monotonic() - start, **declared(implementation))
