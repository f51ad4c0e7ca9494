"""A pool of gloo ranks that stays up: `pools.run(world, "module:function", ...)` calls a function on every rank.

The function gets `rank` and `world` and the keywords given; its result comes back per rank. A rank that raises, dies or
takes longer than TIMEOUT seconds fails the call with its traceback, and its pool is thrown away.
"""

import importlib
import multiprocessing
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
PRELOAD = [
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "torch.distributed.checkpoint"),
    *(
        "bitsandbytes",
        "torch_impl",
        "torch_impl.training.train",
        "transformers",
        "transformers.models.llama.modeling_llama",
    ),
]


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """A rank's life: join the group, then answer calls until the pipe closes."""
    import torch  # noqa: PLC0415 - the parent of a forkserver need not have loaded it

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            target, keywords = pipe.recv()
        except EOFError:
            return
        try:
            module, _, name = target.partition(":")
            answer = (True, getattr(importlib.import_module(module), name)(rank=rank, world=world, **keywords))
        except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class _Pool:
    """The ranks of one world size."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.members = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, str(Path(self.folder.name) / "store"), theirs)
            member = context.Process(target=_serve, args=arguments, daemon=True)
            member.start()
            theirs.close()
            self.pipes.append(ours)
            self.members.append(member)

    def call(self, target: str, keywords: dict[str, Any]) -> list[Any]:
        """One answer a rank, in rank order."""
        for pipe in self.pipes:
            pipe.send((target, keywords))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(answers) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailedError(f"ranks {[self.pipes.index(p) for p in waiting]}: no answer in {TIMEOUT} s")
            for pipe in ready:  # the first failure ends the call: the others may be waiting for that rank
                rank = self.pipes.index(pipe)
                ok, answers[rank] = pipe.recv()
                if not ok:
                    raise RankFailedError(f"rank {rank}: {answers[rank]}")
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """End the ranks."""
        for pipe in self.pipes:
            pipe.close()
        for member in self.members:
            member.join(0.5)
            if member.is_alive():
                member.kill()
                member.join()
        self.folder.cleanup()


class Pools:
    """Pools by world size."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def run(self, world: int, target: str, **keywords: Any) -> list[Any]:
        """Call `target` ("module:function") on every rank of a group of `world`."""
        pool = self._pools.get(world) or self._pools.setdefault(world, _Pool(world))
        try:
            return pool.call(target, keywords)
        except (RankFailedError, EOFError, OSError):
            self._pools.pop(world).close()
            raise

    def close(self) -> None:
        """End every rank."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
