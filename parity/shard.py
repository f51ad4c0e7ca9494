"""A shard: one rank's part of a tensor, with its place in the unsharded one. What an implementation gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parity.fields import check_fields

Index = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of `name`; a reader needs nothing else to find it in the whole."""

    name: str
    """The name in the unwrapped model, as `layers.0.lora_A`."""
    kind: str
    """`parameter`, `gradient`, `optimizer:NAME`; `packed`, `absmax` or `decoded` for the codec."""
    step: int
    """0 before the first optimizer step; a gradient of step 1 led to the parameter of step 1."""
    global_shape: tuple[int, ...]
    """The shape of the unsharded tensor."""
    index: Index
    """Slices into the global shape, or one slice into its row-major flattening."""
    array: np.ndarray
    """The values here."""
    rank: int = 0
    """Filled in where the answer arrives, by the pipe that it came through."""

    def __post_init__(self) -> None:
        """Refuse, where it is made and again where it arrives, what no check could read.

        Raises:
            TypeError: a field holds something else than it declares, or the array more values than the whole has.
        """
        check_fields(self, Shard)
        if self.array.size > math.prod(self.global_shape):
            raise TypeError(
                f"{self.name} {self.kind}: {self.array.size} values, of a tensor of shape {self.global_shape}"
            )

    @property
    def key(self) -> tuple[int, str, str]:
        """What expectation it is compared with."""
        return self.step, self.kind, self.name

    def part_of(self, whole: np.ndarray) -> np.ndarray:
        """The same part of an unsharded array.

        Raises:
            IndexError: the index does not fit the whole.
        """
        flat = len(self.index) == 1 and len(self.global_shape) != 1
        target = whole.reshape(-1) if flat else whole
        if len(self.index) != target.ndim:
            raise IndexError(f"{len(self.index)} slices for {target.ndim} dims")
        for part, size in zip(self.index, target.shape, strict=True):
            if not 0 <= part.start <= part.stop <= size:
                raise IndexError(f"{part.start}:{part.stop} is outside 0:{size}")
        return target[(*self.index, ...)]  # a view, also of a tensor without axes


def whole_index(shape: tuple[int, ...]) -> Index:
    """The index of a tensor that is not sharded."""
    return tuple(slice(0, size) for size in shape)


def describe_index(index: Index) -> str:
    """`[0:17, 0:96]`."""
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in index) + "]"
