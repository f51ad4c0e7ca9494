"""Implementations that misbehave in the ways of a third party: what a run must survive, name, and never hold.

Every class but `Good` does one odd thing, which its docstring says. `test_weird.py` has what becomes of each. Ranks
import this module by name; the tests themselves only read it.
"""

# ruff: noqa: ARG001, ARG002, ARG005 - a hook need not use all that it is told

import ctypes
import dataclasses
import functools
import gc
import json
import os
import signal
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard

from parity.implementations.torch_stack import TorchStack
from parity.shard import Shard

SLEEP_SECONDS = 1000
"""Longer than any test waits."""


class Layer(torch.nn.Module):
    """DoRA, as README has it."""

    def __init__(self, weight, lora_A, lora_B, magnitude, *, scaling, bias=None):
        super().__init__()
        self.weight, self.bias, self.scaling = weight, bias, scaling
        self.lora_A, self.lora_B, self.magnitude = map(torch.nn.Parameter, (lora_A, lora_B, magnitude))

    def forward(self, x):
        """D1, with the norm detached (D5)."""
        V = self.weight + self.scaling * self.lora_B @ self.lora_A
        norm = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64).to(V.dtype).detach()
        y = (self.magnitude / torch.where(norm > 0, norm, torch.inf)) * (x @ V.T)
        return y if self.bias is None else y + self.bias


class Good(TorchStack):
    """Right, unsharded and under FSDP2."""

    strategies = ("none", "fsdp2")

    def layer(self, case, arrays):
        """One layer; the odd thing comes first."""
        self.does(case)
        return Layer(**arrays, scaling=case.alpha / case.rank)

    def shard(self, model, case):
        """Shard the layers, then the whole."""
        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)

    def does(self, case):
        """Do nothing odd."""


# what a rank may do while it builds its layers


def deed(function):
    """A class attribute `does` that calls the function, whatever the case."""
    return lambda self, case: function()


def raises(error):
    """A class attribute `does` that raises."""

    def does(self, case):
        raise error

    return does


class OwnBaseError(BaseException):
    """No Exception."""


class Unprintable(Exception):
    """An error that has no text."""

    def __str__(self):
        raise OwnBaseError


class Raises(Good):
    """Raises, with a text of several lines and two thousand letters."""

    does = raises(RuntimeError("multi\nline\nmessage " + "x" * 2000))


class RaisesEscapes(Good):
    """Raises, with a text that would turn the terminal red."""

    does = raises(RuntimeError("\x1b[31mred\x1b[0m \u202e backwards"))


class RaisesInRefuses(Good):
    """Raises where it is asked whether it takes the case."""

    def refuses(self, case):
        """Raise."""
        raise ValueError("in refuses")


class RaisesInInit(Good):
    """Raises where it is constructed."""

    def __init__(self):
        raise ValueError("in init")


class NeedsArgs(Good):
    """Cannot be constructed without arguments."""

    def __init__(self, number):
        self.number = number


class RaisesWithoutText(Good):
    """Raises an error whose text cannot be had."""

    does = raises(Unprintable())


class Exits(Good):
    """Leaves with status 0, by an exception."""

    does = deed(lambda: sys.exit(0))


class LeavesAtOnce(Good):
    """Leaves with status 0, without an exception."""

    does = deed(lambda: os._exit(0))


class KeyboardInterrupts(Good):
    """Raises KeyboardInterrupt."""

    does = raises(KeyboardInterrupt())


class RaisesBase(Good):
    """Raises a BaseException of its own."""

    does = raises(OwnBaseError("base"))


class GeneratorExits(Good):
    """Raises GeneratorExit."""

    does = raises(GeneratorExit())


class StopsIteration(Good):
    """Raises StopIteration within a generator."""

    does = raises(StopIteration())


class Recurses(Good):
    """Calls itself without end."""

    def does(self, case):
        """Call."""
        self.does(case)


class Faults(Good):
    """Reads address 0."""

    does = deed(lambda: ctypes.string_at(0))


class Aborts(Good):
    """Aborts."""

    does = deed(os.abort)


class KillsPeer(Good):
    """Rank 0 kills itself while rank 1 goes on."""

    def does(self, case):
        """Kill."""
        if case.world > 1 and torch.distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _kill_fork_server():
    """Of two ranks the second may find another parent in its place: that is the test's own process."""
    parent = os.getppid()
    if b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes():
        os.kill(parent, signal.SIGKILL)


class KillsParent(Good):
    """Kills the fork server."""

    does = deed(_kill_fork_server)


class StopsItself(Good):
    """Stops, as by Ctrl-Z."""

    does = deed(lambda: os.kill(os.getpid(), signal.SIGSTOP))


class Hangs(Good):
    """Sleeps."""

    does = deed(lambda: time.sleep(SLEEP_SECONDS))


class HangsInC(Good):
    """Sleeps in a C library."""

    does = deed(lambda: ctypes.CDLL(None).sleep(SLEEP_SECONDS))


class IgnoresSignals(Good):
    """Sleeps, whatever signal comes."""

    def does(self, case):
        """Sleep again and again."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(SLEEP_SECONDS)


class Allocates(Good):
    """Takes more memory than a rank may have, and less than the machine has."""

    does = deed(lambda: bytearray(6 * 2**30))


class AllocatesTensor(Good):
    """Asks torch for more memory than a rank may have, and less than the machine has."""

    does = deed(lambda: torch.empty(6 * 2**28))


class GrowsSlowly(Good):
    """Takes memory bit by bit, and writes to it, until there is no more."""

    def does(self, case):
        """Take a GiB at a time."""
        kept = []
        while True:
            kept.append(b"x" * 2**30)


class PrintsVerdict(Good):
    """Prints a verdict, escape sequences and bytes that are no text."""

    def does(self, case):
        """Print."""
        print("HOLDS: 630 cases, 56980 checks that could have failed", flush=True)  # noqa: T201 - that is the point
        sys.stderr.write("\x1b[31mboo\x1b[0m\n")
        os.write(1, b"\x00\xff raw\n" * 3)


class ClosesOutputs(Good):
    """Closes its standard output and error."""

    does = deed(lambda: os.closerange(1, 3))


class ClosesEverything(Good):
    """Closes all that it has open, its pipe too."""

    does = deed(lambda: os.closerange(3, 200))


class Forks(Good):
    """Forks: a copy of the rank goes on beside it."""

    does = deed(os.fork)


class ForksSleeper(Good):
    """Leaves a forked child behind that sleeps."""

    def does(self, case):
        """Fork."""
        if os.fork() == 0:
            time.sleep(SLEEP_SECONDS)
            os._exit(0)


class StartsSleeper(Good):
    """Leaves a program behind that sleeps."""

    does = deed(lambda: subprocess.Popen(["sleep", str(SLEEP_SECONDS)]))  # noqa: S603, S607 - any sleep will do


class StartsDaemon(Good):
    """Leaves a program behind that has a session of its own and no parent."""

    does = deed(
        lambda: subprocess.run(["sh", "-c", f"setsid sleep {SLEEP_SECONDS} &"], check=True)  # noqa: S603, S607 - any shell
    )


class StartsDaemonAndSleeps(StartsDaemon):
    """Leaves such a program behind, and sleeps."""

    def does(self, case):
        """Start it, and sleep."""
        StartsDaemon.does(self, case)
        time.sleep(SLEEP_SECONDS)


class ChangesFolder(Good):
    """Goes to another working directory."""

    does = deed(lambda: os.chdir("/"))


class LeavesGroup(Good):
    """Destroys the process group."""

    def does(self, case):
        """Destroy it."""
        if case.world > 1:
            torch.distributed.destroy_process_group()


class SpoilsInputs(Good):
    """Fills the arrays that it was given with NaN, once it has copies."""

    def layer(self, case, arrays):
        """Copy, and spoil."""
        layer = super().layer(case, {name: array.clone() for name, array in arrays.items()})
        for array in arrays.values():
            array.fill_(float("nan"))
        return layer


class ChangesCase(Good):
    """Declares the case to have no steps."""

    def does(self, case):
        """Change it."""
        object.__setattr__(case, "steps", 0)


class PatchesJudgeInRank(Good):
    """Replaces the check that its own process has loaded, and gives garbage."""

    def does(self, case):
        """Replace it."""
        from parity.checks import shard_check  # noqa: PLC0415 - as late as a third party would

        shard_check.check_shard = None

    def run(self, case, place):
        """Give sevens."""
        for shard in super().run(case, place):
            yield dataclasses.replace(shard, array=np.full_like(shard.array, 7.0))


# what a rank may give in the place of its shards


class Changed(Good):
    """Every shard is changed in the fields that `changes` gives; none of them unless a subclass says so."""

    changes = staticmethod(lambda shard: {})
    only = None
    """The kind of shard that is changed, or None for all."""

    def run(self, case, place):
        """Change, and give."""
        for shard in super().run(case, place):
            meant = self.only in {None, shard.kind}
            yield dataclasses.replace(shard, **self.changes(shard)) if meant else shard


def given(**fields):
    """`changes` that puts these values into the fields."""
    return staticmethod(lambda shard: fields)


def values(function):
    """`changes` that puts the array through a function."""
    return staticmethod(lambda shard: {"array": function(shard.array)})


def slices(function):
    """`changes` that puts each slice of the index through a function of its start, its stop and the whole's size."""
    return staticmethod(
        lambda shard: {
            "index": tuple(
                function(part.start, part.stop, size)
                for part, size in zip(shard.index, shard.global_shape, strict=True)
            )
        }
    )


class NanGradients(Changed):
    """Its gradients are NaN."""

    only, changes = "gradient", values(lambda array: np.full_like(array, np.nan))


class AllNan(Changed):
    """All is NaN."""

    changes = values(lambda array: np.full_like(array, np.nan))


class InfiniteGradients(Changed):
    """Its gradients are infinite."""

    only, changes = "gradient", values(lambda array: np.full_like(array, np.inf))


class Zero(Changed):
    """All is zero."""

    changes = values(np.zeros_like)


class Constant(Changed):
    """All is seven, sharded and unsharded."""

    changes = values(lambda array: np.full_like(array, 7.0))


class Broadcast(Changed):
    """All is one seven that is shown in every place."""

    changes = values(lambda array: np.broadcast_to(np.float32(7), array.shape))


class Wider(Changed):
    """The right numbers, in float64."""

    changes = values(lambda array: array.astype(np.float64))


class Half(Changed):
    """The numbers rounded to float16."""

    changes = values(lambda array: array.astype(np.float16))


class Integers(Changed):
    """The numbers cut to integers."""

    changes = values(lambda array: array.astype(np.int64))


class Booleans(Changed):
    """The numbers cut to true and false."""

    changes = values(lambda array: array.astype(bool))


class Complex(Changed):
    """The numbers as complex ones."""

    changes = values(lambda array: array.astype(np.complex64))


class LongDouble(Changed):
    """The numbers in a float that another machine has in another form."""

    changes = values(lambda array: array.astype(np.longdouble))


class BigEndian(Changed):
    """The right numbers, in the other order of bytes."""

    changes = values(lambda array: array.astype(">f4"))


class Structured(Changed):
    """Arrays with a named field."""

    changes = values(lambda array: np.zeros(array.shape, dtype=[("a", "f4")]))


class Void(Changed):
    """Arrays of bytes without a meaning."""

    changes = values(lambda array: np.zeros(array.shape, dtype="V4"))


class Objects(Changed):
    """Arrays of Python's objects."""

    changes = values(lambda array: array.astype(object))


class Strings(Changed):
    """Arrays of text."""

    changes = values(lambda array: array.astype(str))


class Strided(Changed):
    """The right numbers, columns first in memory."""

    changes = values(np.asfortranarray)


class Masked(Changed):
    """Arrays of which every element is masked."""

    changes = values(lambda array: np.ma.array(np.full_like(array, 7.0), mask=True))


class Matrices(Changed):
    """The right numbers, in numpy's old matrix class."""

    changes = values(lambda array: np.asmatrix(array) if array.ndim == 2 else array)


class _AlwaysEqual(np.ndarray):
    """Says that it is equal to everything, and that nothing lies between."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(array) for array in inputs]
        if ufunc in {np.equal, np.not_equal}:
            return np.full(self.shape, ufunc is np.equal)
        if ufunc is np.subtract:
            return np.zeros(self.shape)
        return getattr(ufunc, method)(*plain, **{name: value for name, value in options.items() if name != "out"})


class Lies(Changed):
    """All is seven, in arrays that say that they are equal to everything."""

    changes = values(lambda array: np.full_like(array, 7.0).view(_AlwaysEqual))


def _replaces_judge(value):
    """Make every check pass, in the process that calls me."""
    import parity.pipeline  # noqa: PLC0415 - where this runs, it is loaded
    from parity.checks.shard_check import Check  # noqa: PLC0415

    def passes(shard, expected):
        where = {"tensor": shard.name, "kind": shard.kind, "step": shard.step, "rank": shard.rank, "index": shard.index}
        return Check(**where, mode="bitwise", worst=0.0, limit=0.0, ratio=0.0, passed=True)

    parity.pipeline.check_shard = passes
    return value


class _RunsWhereUnpickled(np.ndarray):
    """An array whose pickle calls a function."""

    def __reduce__(self):
        return _replaces_judge, (np.asarray(self).copy(),)


class PatchesJudge(Changed):
    """All is seven, in arrays whose pickle replaces the judge."""

    changes = values(lambda array: np.full_like(array, 7.0).view(_RunsWhereUnpickled))


class _ReplacesJudge:
    """An object whose pickle replaces the judge."""

    def __reduce__(self):
        return _replaces_judge, (7,)


class PatchesJudgeByName(Changed):
    """All is seven, and a field that nobody asked for has a pickle that replaces the judge."""

    def run(self, case, place):
        """Add the field."""
        for shard in super().run(case, place):
            sevens = dataclasses.replace(shard, array=np.full_like(shard.array, 7.0))
            sevens.__dict__["extra"] = _ReplacesJudge()
            yield sevens


class WithoutValues(Changed):
    """No array at all."""

    changes = given(array=None)


class HugeArray(Changed):
    """Arrays of a hundred million values for tensors of some hundred."""

    only, changes = "gradient", values(lambda array: np.zeros((10000, 10000), array.dtype))


class WholeForPart(Changed):
    """Arrays of the whole's shape, at a part's index."""

    changes = staticmethod(lambda shard: {"array": np.zeros(shard.global_shape, shard.array.dtype)})


class WholeIndex(Changed):
    """Indices of the whole, for arrays of a part."""

    changes = slices(lambda start, stop, size: slice(0, size))


class ShiftedIndex(Changed):
    """Indices that lie one further."""

    changes = slices(lambda start, stop, size: slice(start + 1, stop + 1))


class NegativeIndex(Changed):
    """Indices counted from the end."""

    changes = slices(lambda start, stop, size: slice(start - size, stop - size))


class SteppedIndex(Changed):
    """Indices that run backwards."""

    changes = slices(lambda start, stop, size: slice(start, stop, -1))


class HugeIndex(Changed):
    """Indices beyond what 64 bits hold."""

    changes = slices(lambda start, stop, size: slice(10**30, 10**30))


class EmptyShards(Changed):
    """Empty arrays at empty indices."""

    changes = staticmethod(
        lambda shard: {
            "index": tuple(slice(0, 0) for _ in shard.index),
            "array": np.zeros((0,) * shard.array.ndim, shard.array.dtype),
        }
    )


class IntegerIndex(Changed):
    """Indices that are no slices."""

    changes = given(index=(0,))


class OtherShape(Changed):
    """Shapes with their sizes in the other order."""

    changes = staticmethod(lambda shard: {"global_shape": tuple(reversed(shard.global_shape))})


class ListedShape(Changed):
    """Shapes that are lists."""

    changes = staticmethod(lambda shard: {"global_shape": list(shard.global_shape)})


class NoShape(Changed):
    """No shape at all."""

    changes = given(global_shape=None)


class NoName(Changed):
    """No name at all."""

    changes = given(name=None)


class ListedName(Changed):
    """Names that are lists."""

    changes = given(name=["a"])


class LongName(Changed):
    """Names of a million letters."""

    changes = given(name="x" * 10**6)


class EscapedName(Changed):
    """Names that would turn the terminal red."""

    changes = given(name="\x1b[31mred")


class MarkedKind(Changed):
    """Kinds in the terminal library's own mark-up."""

    changes = given(kind="[bold]x[/nope]")


class NoKind(Changed):
    """No kind at all."""

    changes = given(kind=None)


class WrittenStep(Changed):
    """Steps that are text."""

    changes = given(step="1")


class FloatStep(Changed):
    """Steps that are floats."""

    changes = staticmethod(lambda shard: {"step": float(shard.step)})


class OtherRank(Changed):
    """Shards that say that they come from the rank after; the values are right."""

    changes = staticmethod(lambda shard: {"rank": shard.rank + 1})


class Forced(Good):
    """Shards whose name is taken away after they were made, past every check in the rank."""

    def run(self, case, place):
        """Take it away."""
        for shard in super().run(case, place):
            object.__setattr__(shard, "name", None)
            yield shard


class ForcedValues(Good):
    """Shards whose values are replaced by text after they were made."""

    def run(self, case, place):
        """Replace them."""
        for shard in super().run(case, place):
            object.__setattr__(shard, "array", "seven")
            yield shard


class Twice(Good):
    """Each shard twice."""

    def run(self, case, place):
        """Give it again."""
        for shard in super().run(case, place):
            yield from (shard, shard)


class RightTheSecondTime(Good):
    """Each shard twice, wrong the first time."""

    def run(self, case, place):
        """Give it wrong, then right."""
        for shard in super().run(case, place):
            yield from (dataclasses.replace(shard, array=shard.array + 1), shard)


class Extra(Good):
    """One tensor more than there is."""

    def run(self, case, place):
        """Add it."""
        yield from super().run(case, place)
        index, array = (slice(0, 3),), np.zeros(3)
        yield Shard(name="extra", kind="parameter", step=0, global_shape=(3,), index=index, array=array)


class AddsFunction(Good):
    """Shards with a function in a field that nobody asked for; the rest is right."""

    def run(self, case, place):
        """Add it."""
        for shard in super().run(case, place):
            shard.__dict__["f"] = lambda: 0
            yield shard


class OwnClass(Good):
    """Shards of a class of its own; the rest is right."""

    def run(self, case, place):
        """Make them."""

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(Shard):
            """A shard."""

        for shard in super().run(case, place):
            yield Mine(**{field.name: getattr(shard, field.name) for field in dataclasses.fields(Shard)})


class NoShards(Good):
    """Nothing."""

    def run(self, case, place):
        """Give nothing."""
        return iter(())


class NoneForShards(Good):
    """None in the place of the shards."""

    def run(self, case, place):
        """Give None."""


class TextForShards(Good):
    """Text in the place of the shards."""

    def run(self, case, place):
        """Give text."""
        return "abc"


class NumbersForShards(Good):
    """Numbers in the place of the shards."""

    def run(self, case, place):
        """Give numbers."""
        return [1, 2, 3]


class NeverEnds(Good):
    """The same shards again and again."""

    def run(self, case, place):
        """Repeat."""
        shards = list(super().run(case, place))
        while True:
            yield from shards


# what it may say of the cases that it takes


def refusing(reason):
    """A class attribute `refuses` that says that, whatever the case."""
    return lambda self, case: reason


class RefusesAll(Good):
    """Takes no case."""

    refuses = refusing("no")


class RefusesNumber(Good):
    """Refuses with a number for a reason."""

    refuses = refusing(5)


class RefusesEmpty(Good):
    """Refuses without a word, which is no refusal."""

    refuses = refusing("")


class RefusesMarkup(Good):
    """Refuses with mark-up and escape sequences."""

    refuses = refusing("[bold]x[/red] [/] \x1b[31m")


class RefusesLong(Good):
    """Refuses with a million letters."""

    refuses = refusing("x" * 10**6)


class OddUnits(Good):
    """Declares units that S7 does not know."""

    units = 7


# what it may write to the pipe that leads to the parent


def writing(*pieces):
    """A method `run` that writes bytes to each pipe that it finds, then is honest."""

    def run(self, case, place):
        for found in gc.get_objects():
            if type(found) is Connection and not found.closed and found.writable and found.readable:
                for piece in pieces:
                    os.write(found.fileno(), piece)
        yield from Good.run(self, case, place)

    return functools.wraps(Good.run)(run)


def frame(**header):
    """A frame of the suite's own form."""
    text = json.dumps(header).encode()
    return struct.pack("!4sIQ", b"dora", len(text), 0) + text


class WritesGarbage(Good):
    """Writes eight bytes that are no answer."""

    run = writing(struct.pack("!i", 8) + b"\xff" * 8)


class WritesPickle(Good):
    """Writes text, pickled as multiprocessing does."""

    run = writing(struct.pack("!i", 11) + b"\x80\x05\x8c\x07garbage.")


class WritesStale(Good):
    """Writes an answer to a job of long ago: no shards, and a refusal."""

    run = writing(frame(job=0, answer=[{"shards": [], "seconds": 0.0, "refused": "faked", "units": "", "said": ""}]))


class WritesHugeHeader(Good):
    """Announces a header of four GiB."""

    run = writing(struct.pack("!4sIQ", b"dora", 2**32 - 1, 0))


class WritesHugeBody(Good):
    """Announces a body of 2**60 bytes."""

    run = writing(struct.pack("!4sIQ", b"dora", 2, 2**60) + b"{}")


class WritesDeep(Good):
    """Writes a header of a million brackets, one in the other."""

    run = writing(struct.pack("!4sIQ", b"dora", 100_000, 0) + b"[" * 100_000)


class StopsAmidAnswer(Hangs):
    """Announces a header, writes a part of it, and sleeps."""

    run = writing(struct.pack("!4sIQ", b"dora", 1000, 0) + b"abc")


NO_CLASS = 5
"""`--impl weird:NO_CLASS`."""
INSTANCE = Good()
"""`--impl weird:INSTANCE`, which cannot be called."""


def gives_good():
    """`--impl weird:gives_good`: what gives an implementation is as good as a class."""
    return Good()


def gives_none():
    """`--impl weird:gives_none`."""
