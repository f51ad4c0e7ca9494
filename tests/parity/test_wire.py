"""What crosses from a rank arrives as it was, or is no answer: fields are checked, and nothing that comes is run."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import struct
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from parity.errors import NoAnswer
from parity.fields import DTYPES
from parity.job import RankAnswer
from parity.shard import Shard
from parity.workers.answers import pack_answers, unpack_answers
from parity.workers.wire import Packed, Source, has_spoken, is_listening, plain, receive, send_answer, send_error

JOB = 7
SOON = 0.2
MOST = 1000


def shard(array, **fields):
    """A whole tensor."""
    index = tuple(slice(0, size) for size in array.shape)
    usual = {"name": "layers.0.lora_A", "kind": "gradient", "step": 1, "global_shape": array.shape, "index": index}
    return Shard(**usual | fields, array=array)


def crossed(*answers, first_rank=0):
    """Answers as they arrive: through JSON and bytes."""
    packed = pack_answers(list(answers))
    return unpack_answers(json.loads(json.dumps(packed.header, default=plain)), bytearray(packed.body), first_rank)


@pytest.fixture
def pipe():
    """Our end as a source, their end, and their death as a third pipe that closes."""
    ours, theirs = multiprocessing.Pipe()
    alive, death = multiprocessing.Pipe()
    yield Source(ours, alive.fileno(), lambda: True), theirs, death
    for end in (ours, theirs, alive, death):
        end.close()


def take(source, seconds=SOON):
    """One frame."""
    return receive(source, JOB, deadline=time.monotonic() + seconds, most_bytes=MOST)


def prefix(header=0, body=0, magic=b"dora"):
    """A frame's beginning."""
    return struct.pack("!4sIQ", magic, header, body)


def frame(content):
    """A frame without a body."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return prefix(len(text)) + text


# what is sent arrives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)], ids=str)
def test_arrays_arrive_to_the_bit(dtype, shape):
    """Every dtype and shape that a shard may have arrives with all its bits; also NaN, and bfloat16."""
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    array = np.frombuffer(bytes(range(1, size + 1)), DTYPES[dtype]).reshape(shape) if size else np.zeros(shape, dtype)
    ((arrived,),) = (answer.shards for answer in crossed(RankAnswer([shard(array)], 0.5)))

    assert (arrived.array.dtype, arrived.array.shape) == (array.dtype, shape)
    assert arrived.array.tobytes() == array.tobytes()
    assert arrived.array.flags.writeable


def test_fields_arrive_as_they_were():
    """Everything else that a shard says arrives too; the rank is the pipe's."""
    one, two = shard(np.zeros((2, 3), np.float32)), shard(np.ones(4, ml_dtypes.bfloat16), step=2, kind="parameter")
    part = shard(np.zeros(2, np.int64), global_shape=(3, 4), index=(slice(np.int64(5), 7),), rank=9)
    first, second = crossed(RankAnswer([one, two], 0.25, units="layer"), RankAnswer([part], 1, said="no"), first_rank=4)

    assert [(s.name, s.kind, s.step, s.global_shape, s.index, s.rank) for s in (*first.shards, *second.shards)] == [
        ("layers.0.lora_A", "gradient", 1, (2, 3), (slice(0, 2), slice(0, 3)), 4),
        ("layers.0.lora_A", "parameter", 2, (4,), (slice(0, 4),), 4),
        ("layers.0.lora_A", "gradient", 1, (3, 4), (slice(5, 7),), 5),
    ]
    assert (first.seconds, first.refused, first.units, second.said) == (0.25, None, "layer", "no")


def test_columns_first_arrives_rows_first():
    """How an array lies in memory is no part of its values."""
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    ((arrived,),) = (answer.shards for answer in crossed(RankAnswer([shard(array)], 0.5)))

    assert arrived.array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_frame_arrives(pipe):
    """Header and body come as they were sent, and nothing stays behind."""
    source, theirs, _ = pipe
    send_answer(theirs, JOB, Packed({"a": [1, slice(2, 3)]}, b"xyz"))
    came = take(source)

    assert (came.answer, came.error, came.body) == ({"a": [1, [2, 3]]}, None, bytearray(b"xyz"))
    assert not has_spoken(source.connection)


def test_an_error_arrives(pipe):
    """So does why there is no answer."""
    source, theirs, _ = pipe
    send_error(theirs, JOB, "raised ValueError")

    assert take(source).error == "raised ValueError"


# what is no frame


class _RunsWhereRead:
    """A pickle that would leave the process."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        pytest.param(prefix(magic=b"jax!"), "begins with the bytes b'jax!", id="another beginning"),
        pytest.param(pickle.dumps(_RunsWhereRead()), "begins with the bytes", id="a pickle"),
        pytest.param(prefix(2**32 - 1), "its header is to have 4294967295 bytes", id="a huge header"),
        pytest.param(prefix(2, 2**63) + b"{}", "its body is to have", id="a huge body"),
        pytest.param(prefix(2, MOST + 1) + b"{}", f"more than {MOST}", id="a body beyond the limit"),
        pytest.param(frame(b"\xff{"), "cannot be read: UnicodeDecodeError", id="no text"),
        pytest.param(frame(b"{'a'}"), "cannot be read: JSONDecodeError", id="no JSON"),
        pytest.param(frame(b"[" * 10**5), "cannot be read: RecursionError", id="too deep"),
        pytest.param(frame(b'{"job": ' + b"9" * 5000 + b"}"), "cannot be read: ValueError", id="a huge number"),
        pytest.param(frame([JOB]), "is no object", id="a list"),
        pytest.param(frame({"answer": []}), "answers another job", id="without a job"),
        pytest.param(frame({"job": JOB - 1, "answer": []}), "answers another job", id="a stale job"),
        pytest.param(frame({"job": str(JOB), "answer": []}), "answers another job", id="a job in words"),
        pytest.param(frame({"job": JOB, "error": [1]}), "its error is no text", id="an error that is no text"),
    ],
)
def test_what_is_no_frame_is_said(pipe, sent, said):
    """Bytes of any other form are refused before memory is taken for what they announce, and are never run."""
    source, theirs, _ = pipe
    os.write(theirs.fileno(), sent)

    with pytest.raises(NoAnswer, match=said):
        take(source)


@pytest.mark.parametrize(
    "sent", [b"", b"do", prefix(10) + b"{", prefix(len(b'{"job":7}'), 9) + b'{"job":7}abc'], ids=repr
)
def test_the_limit_holds_for_the_whole_frame(pipe, sent):
    """Who stops amid a frame is not waited for beyond the limit, wherever that is."""
    source, theirs, _ = pipe
    os.write(theirs.fileno(), sent)
    start = time.monotonic()

    with pytest.raises(TimeoutError):
        take(source)
    assert time.monotonic() - start < 10 * SOON


def test_who_sends_drop_by_drop_is_not_waited_for(pipe):
    """Bytes that keep coming do not put off the limit."""
    source, theirs, _ = pipe
    os.write(theirs.fileno(), prefix(1000))
    stop = threading.Event()

    def drip():
        while not stop.wait(SOON / 10):
            os.write(theirs.fileno(), b" ")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        with pytest.raises(TimeoutError):
            take(source)
    finally:
        stop.set()
        dripping.join()


def test_an_end_is_seen_though_the_pipe_stays_open(pipe):
    """A rank that has ended answers no more, even where a descendant of it still has the pipe."""
    source, theirs, death = pipe
    os.write(theirs.fileno(), prefix(10))
    death.close()

    with pytest.raises(EOFError):
        take(source, seconds=30.0)


def test_a_dead_fork_server_is_no_end(pipe):
    """Where what ended was not the rank, its answer is waited for."""
    source, theirs, death = pipe
    death.close()
    threading.Timer(SOON, send_answer, (theirs, JOB, Packed([1]))).start()

    assert take(dataclasses.replace(source, is_gone=lambda: False), seconds=30.0).answer == [1]


def test_what_was_sent_before_the_end_is_read(pipe):
    """An answer counts, though the rank has ended since."""
    source, theirs, death = pipe
    send_answer(theirs, JOB, Packed([1]))
    death.close()

    assert take(source).answer == [1]


def test_who_does_not_read_is_seen(pipe):
    """A job is not sent to a pipe that is full."""
    source, theirs, _ = pipe
    os.set_blocking(source.connection.fileno(), False)
    before = is_listening(source.connection)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(source.connection.fileno(), b"x" * 10**5)

    assert (before, is_listening(source.connection), has_spoken(theirs)) == (True, False, True)


# what is no answer

ROW = ["layers.0.lora_A", "gradient", 1, [2, 3], [[0, 2], [0, 3]], "float32", [2, 3]]
COLUMNS = ("name", "kind", "step", "global_shape", "index", "dtype", "shape")
BODY = bytes(24)


def answer(row=None, **fields):
    """The header of an answer with one shard."""
    usual = {"shards": [row or ROW], "seconds": 0.5, "refused": None, "units": "", "gives": [], "said": ""}
    return [usual | fields]


def changed(**columns):
    """The header of an answer whose shard has other columns."""
    return answer([columns.get(name, value) for name, value in zip(COLUMNS, ROW, strict=True)])


def test_the_plain_answer_is_one():
    """The header that the cases below change is sound."""
    assert len(unpack_answers(answer(), bytearray(BODY), 0)[0].shards) == 1


ODD = [
    (None, "not iterable"),
    ({"a": 1}, ""),
    ([5], ""),
    (["abc"], ""),
    ([{}], "KeyError: 'shards'"),
    (answer(shards=5), "not iterable"),
    (answer(shards=["abc"]), ""),
    (answer(ROW[:-1]), ""),
    (answer([*ROW, 5]), ""),
    (answer(seconds="1"), "seconds is str '1'"),
    (answer(seconds=float("nan")), "seconds is float 'nan'"),
    (answer(refused=5), "refused is int '5'"),
    (answer(refused="\x1b[31m"), "refused is str"),
    (answer(said="x" * 5000), "said is text of 5000 characters"),
    (answer(units="world"), "units 'world'"),
    (changed(name=None), "name is None"),
    (changed(name=["a"]), "name is list"),
    (changed(name="two\nlines"), "name is str"),
    (changed(name="x" * 5000), "name is text of 5000 characters"),
    (changed(kind={}), "kind is dict"),
    (changed(step="1"), "step is str '1'"),
    (changed(step=-1), "step is int '-1'"),
    (changed(step=True), "step is bool 'True'"),
    (changed(step=1.0), "step is float '1.0'"),
    (changed(step=10**30), "step is int"),
    (changed(global_shape=None), ""),
    (changed(global_shape="ab"), "global_shape is tuple"),
    (changed(global_shape=[2, -3]), "global_shape is tuple"),
    (changed(global_shape=[2, 3.0]), "global_shape is tuple"),
    (changed(global_shape=[2, 10**30]), "global_shape is tuple"),
    (changed(global_shape=[1] * 100), "global_shape is tuple"),
    (changed(global_shape=[2, 2]), "6 values, of a tensor of shape (2, 2)"),
    (changed(index=None), ""),
    (changed(index=[[0, 2], [0, 3, 1]]), ""),
    (changed(index=[[0, 2], [0, None]]), "index is tuple"),
    (changed(index=[[0, 2], [0, 10**30]]), "index is tuple"),
    (changed(index=[[0, 2], ["a", "b"]]), "index is tuple"),
    (changed(dtype="object"), "KeyError: 'object'"),
    (changed(dtype=">f4"), "KeyError"),
    (changed(dtype=["float32"]), ""),
    (changed(dtype="float64"), "has more values than came"),
    (changed(shape=[2, 2]), "8 bytes of its values belong to no shard"),
    (changed(shape=[2, -3]), "no shape that an array can have"),
    (changed(shape=[2, 3.0]), "no shape that an array can have"),
    (changed(shape=[2**62, 2**62]), "has more values than came"),
    (changed(shape=[10**30]), "no shape that an array can have"),
    (changed(shape=[1] * 100), "no shape that an array can have"),
    (changed(shape=7), ""),
]
"""Headers of answers, and what is said of each."""


@pytest.mark.parametrize(("header", "said"), ODD, ids=[f"{n}-{said}" for n, (_, said) in enumerate(ODD)])
def test_an_odd_field_is_no_answer(header, said):
    """A field that is missing, of another type, out of range or without its bytes is said; nothing else is raised."""
    with pytest.raises(NoAnswer) as error:
        unpack_answers(header, bytearray(BODY), 0)

    assert said in str(error.value)
