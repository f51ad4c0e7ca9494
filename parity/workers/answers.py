"""What crosses in a frame: the answers of ranks, field by field, and the oracle's, which the judge trusts.

Of a rank's answer the header holds every field but the arrays; of an array it holds dtype and shape, and the body its
values, one after the other. Whoever reads it makes the records anew, and they check themselves: what a rank sends is
data, and an odd field is the error of its case.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from parity.errors import NoAnswer
from parity.fields import DTYPES
from parity.job import RankAnswer
from parity.shard import Shard
from parity.workers.wire import Packed

MOST_SHARDS = 2**16
"""In one answer; the largest of the suite's own cases has a tenth of it."""

_DIMS = 32
_SHARD_FIELDS = tuple(field for field in dataclasses.fields(Shard) if field.name not in {"array", "rank"})
_ANSWER_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(RankAnswer) if field.name != "shards"}
_READERS: dict[str, Callable[[Any], Any]] = {
    "tuple[int, ...]": tuple,
    "tuple[str, ...]": tuple,
    "Index": lambda rows: tuple(slice(start, stop) for start, stop in rows),
}
"""By a field's annotation, where JSON has another form."""


def bounded(shards: Iterable[Shard], most_bytes: int) -> list[Shard]:
    """All that an implementation gives, but no more than an answer may hold.

    Raises:
        TypeError: it gave something else than shards.
        NoAnswer: it gave too many, or too much.
    """
    kept: list[Shard] = []
    size = 0
    for shard in shards:
        if not isinstance(shard, Shard):
            raise TypeError(f"it gave a {type(shard).__name__}, wanted a Shard")
        size += shard.array.nbytes
        kept.append(shard)
        if len(kept) > MOST_SHARDS:
            raise NoAnswer(f"it gave more than {MOST_SHARDS} shards")
        if size > most_bytes:
            raise NoAnswer(f"it gave more than {most_bytes / 2**30:.1f} GiB of values")
    return kept


def pack_answers(answers: list[RankAnswer]) -> Packed:
    """Answers as they cross; the rank of a shard is the place of its answer in the list."""
    headers, parts = [], []
    for answer in answers:
        rows = [_row(shard) for shard in answer.shards]
        parts += [_values(shard.array) for shard in answer.shards]
        headers.append({"shards": rows} | {name: getattr(answer, name) for name in _ANSWER_FIELDS})
    return Packed(headers, b"".join(parts))


def _row(shard: Shard) -> list[Any]:
    return [
        *(getattr(shard, field.name) for field in _SHARD_FIELDS),
        shard.array.dtype.name,
        shard.array.shape,
    ]


def _values(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def unpack_answers(header: Any, body: bytearray, first_rank: int) -> list[RankAnswer]:
    """Answers anew, of this rank and those after it.

    Raises:
        NoAnswer: a field is missing, odd, or does not agree with the body; which is said.
    """
    try:
        reader = _Reader(body)
        answers = [_answer(row, reader, first_rank + place) for place, row in enumerate(header)]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise NoAnswer(str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}") from None
    if reader.at != len(body):
        raise NoAnswer(f"{len(body) - reader.at} bytes of its values belong to no shard")
    return answers


class _Reader:
    """Cuts arrays off a body, in order."""

    def __init__(self, body: bytearray) -> None:
        self._body = body
        self.at = 0

    def array(self, dtype_name: str, sizes: list[int]) -> np.ndarray:
        """A copy of the next values."""
        dtype, shape = DTYPES[dtype_name], tuple(sizes)
        if len(shape) > _DIMS or any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
            raise TypeError("an array has no shape that an array can have")
        end = self.at + math.prod(shape) * dtype.itemsize
        if end > len(self._body):
            raise TypeError(f"an array of {dtype_name} {shape} has more values than came")
        array = np.frombuffer(self._body, np.uint8, end - self.at, self.at).copy().view(dtype).reshape(shape)
        self.at = end
        return array


def _answer(header: dict[str, Any], reader: _Reader, rank: int) -> RankAnswer:
    shards = [_shard(row, reader, rank) for row in header["shards"]]
    fields = {name: _READERS.get(kind, _as_is)(header[name]) for name, kind in _ANSWER_FIELDS.items()}
    return RankAnswer(shards=shards, **fields)


def _shard(row: list[Any], reader: _Reader, rank: int) -> Shard:
    *values, dtype_name, sizes = row
    fields = {
        field.name: _READERS.get(str(field.type), _as_is)(value)
        for field, value in zip(_SHARD_FIELDS, values, strict=True)
    }
    return Shard(**fields, array=reader.array(dtype_name, sizes), rank=rank)


def _as_is(value: Any) -> Any:
    return value


def pack_trusted(value: Any) -> Packed:
    """The oracle's answer: its process runs this project's own code, so a pickle of it may be read."""
    return Packed(None, pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def unpack_trusted(_header: Any, body: bytearray, _first_rank: int) -> Any:
    """What `pack_trusted` packed."""
    return pickle.loads(body)  # noqa: S301 - of the oracle's process alone
