"""Implementations that misbehave, each in one way: what the pipeline must survive and name. Ranks import them.

`Honest` gives right shards without computing anything: numbers drawn from the tensor's name, rows cut as S1 has it.
The others are honest until the case has more than one rank; then they do what their name says.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np

from parity.shard import Shard

KINDS = ("gradient", "parameter", "optimizer:momentum_buffer")


def barrier():
    """Wait in a collective for every other rank."""
    import torch  # noqa: PLC0415 - only a rank loads torch

    torch.distributed.barrier()


def shapes(case):
    """Every adapter tensor of a stack with its shape, in registration order."""
    for position, (fan_in, fan_out) in enumerate(case.layers):
        yield f"layers.{position}.lora_A", (case.rank, fan_in)
        yield f"layers.{position}.lora_B", (fan_out, case.rank)
        yield f"layers.{position}.magnitude", (fan_out,)


def rows(size, place):
    """S1, written again."""
    step = -(-size // place.world)
    return slice(min(place.rank * step, size), min((place.rank + 1) * step, size))


def shard_of(name, shape, place, *, kind, step):
    """This rank's rows of a tensor that depends on its name, kind and step alone."""
    seed = zlib.crc32(f"{name} {kind} {step}".encode())
    whole = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    index = (rows(shape[0], place), *(slice(0, size) for size in shape[1:]))
    return Shard(name=name, kind=kind, step=step, global_shape=shape, index=index, array=whole[index])


class Honest:
    """Right under FSDP2 and unsharded."""

    def refuses(self, case):
        """It takes everything."""

    def run(self, case, place):
        """Misbehave where several ranks run; give the shards where that came to an end."""
        if case.world > 1:
            self.misbehave(place)
        shards = self.honest(case, place)
        yield from self.spoil(list(shards), place) if case.world > 1 else shards

    def misbehave(self, place):
        """Do nothing wrong."""

    def spoil(self, shards, place):  # noqa: ARG002 - the hook's form
        """Leave the shards as they are."""
        return shards

    def honest(self, case, place):
        """Give the shards that are right."""
        for name, shape in shapes(case):
            yield shard_of(name, shape, place, kind="parameter", step=0)
            for step in range(1, case.steps + 1):
                for kind in KINDS:
                    yield shard_of(name, shape, place, kind=kind, step=step)


class Killed(Honest):
    """Rank 1 dies by SIGKILL while the others wait for it."""

    def misbehave(self, place):
        """Die."""
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        barrier()


class Exits(Honest):
    """Rank 1 leaves with a status of its own."""

    def misbehave(self, place):
        """Leave."""
        if place.rank == 1:
            sys.exit(7)
        barrier()


class Hung(Honest):
    """Rank 1 sleeps while the others wait for it."""

    def misbehave(self, place):
        """Sleep."""
        if place.rank == 1:
            time.sleep(600)
        barrier()


class Raises(Honest):
    """Rank 1 raises while the others wait for it."""

    def misbehave(self, place):
        """Raise."""
        if place.rank == 1:
            raise ValueError("the drawn card\nwas red")
        barrier()


class DiesAfterwards(Honest):
    """Rank 1 answers, and dies before it is asked again."""

    def misbehave(self, place):
        """Leave a bomb behind."""
        if place.rank == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()


class Silent(Honest):
    """No rank gives a shard."""

    def spoil(self, shards, place):  # noqa: ARG002 - the hook's form
        """Give nothing."""
        return []


class Mute(Honest):
    """Nothing is given, unsharded either."""

    def honest(self, case, place):  # noqa: ARG002 - the hook's form
        """Give nothing."""
        return iter(())


class WithoutMagnitudes(Honest):
    """A and B alone are given, unsharded too."""

    def honest(self, case, place):
        """Leave the magnitudes out."""
        return (shard for shard in super().honest(case, place) if not shard.name.endswith("magnitude"))


class OneRankMissing(Honest):
    """Rank 1 keeps its gradient of the first magnitude to itself."""

    def spoil(self, shards, place):
        """Leave it out."""
        lost = {("layers.0.magnitude", "gradient")} if place.rank == 1 else set()
        return [shard for shard in shards if (shard.name, shard.kind) not in lost]


class _Changed(Honest):
    """Rank 1's gradient of the first magnitude is changed."""

    def spoil(self, shards, place):
        """Change the one shard."""
        return [self.changed(s) if place.rank == 1 and self.is_meant(s) else s for s in shards]

    def is_meant(self, shard):
        """Whether this is the one."""
        return (shard.name, shard.kind, shard.step) == ("layers.0.magnitude", "gradient", 1)

    def changed(self, shard):
        """Leave it."""
        return shard


class OutsideIndex(_Changed):
    """Its index lies beyond the tensor's end."""

    def changed(self, shard):
        """Shift the index."""
        return dataclasses.replace(shard, index=(slice(20, 33),))


class OpenIndex(_Changed):
    """Its index has no beginning."""

    def changed(self, shard):
        """Leave the beginning out."""
        return dataclasses.replace(shard, index=(slice(None, 13),))


class SteppedIndex(_Changed):
    """Its index skips elements."""

    def changed(self, shard):
        """Take every second."""
        return dataclasses.replace(shard, index=(slice(14, 27, 2),), array=shard.array[::2])


class NoArray(_Changed):
    """Its array is a list."""

    def changed(self, shard):
        """Give a list."""
        return dataclasses.replace(shard, array=shard.array.tolist())


class Misshapen(_Changed):
    """Its array lacks the last element."""

    def changed(self, shard):
        """Cut."""
        return dataclasses.replace(shard, array=shard.array[:-1])


class OtherShape(_Changed):
    """Its whole tensor is said to have another shape."""

    def changed(self, shard):
        """Claim one more row."""
        return dataclasses.replace(shard, global_shape=(28,))


class NotANumber(_Changed):
    """One element is NaN."""

    def changed(self, shard):
        """Poison the third element."""
        array = shard.array.copy()
        array[2] = np.nan
        return dataclasses.replace(shard, array=array)


class Swapped(Honest):
    """Each of two ranks gives the other's rows of A as its own."""

    def honest(self, case, place):
        """Take the other rank's values, where they have one shape."""
        other = dataclasses.replace(place, rank=place.world - 1 - place.rank)
        pairs = zip(super().honest(case, place), super().honest(case, other), strict=True)
        for mine, theirs in pairs:
            yield dataclasses.replace(mine, array=theirs.array) if mine.name.endswith("lora_A") else mine


class Moved(Honest):
    """Each of two ranks holds the other's rows, and says so: every value is right, on the wrong rank."""

    units = "layer"

    def honest(self, case, place):
        """Be the other rank; who declares S7's units owes the frozen weights too."""
        other = dataclasses.replace(place, rank=place.world - 1 - place.rank)
        yield from super().honest(case, other)
        for position, (fan_in, fan_out) in enumerate(case.layers):
            yield shard_of(f"layers.{position}.base.weight", (fan_out, fan_in), other, kind="parameter", step=0)


class Refuses(Honest):
    """It takes no case."""

    def refuses(self, case):  # noqa: ARG002 - the protocol's form
        """Say why."""
        return "it is Sunday"


class Modules(Honest):
    """Rank 0 writes the modules that it has loaded into the working directory's `modules.txt`."""

    def misbehave(self, place):
        """List them."""
        if place.rank == 0:
            Path("modules.txt").write_text("\n".join(sorted(sys.modules)), encoding="utf-8")


class SleepsOnNf4(Honest):
    """Every rank touches a file and sleeps, once it meets a four-bit base."""

    def run(self, case, place):
        """Sleep, or be honest."""
        if case.base == "nf4":
            Path(f"asleep-{place.world}-{place.rank}").touch()
            time.sleep(600)
        yield from super().run(case, place)


class RefusesAll(Honest):
    """Whatever it meets is refused, sound or not."""

    def meet(self, case, *, bad):  # noqa: ARG002 - the protocol's form
        """Refuse."""
        raise ValueError("layers.1 at (3, 5) is too good")
