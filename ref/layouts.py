"""Layouts: which rank holds what, as index arithmetic on plain integers.

Clauses S1, S2, S6, S7, and Q3 as far as S1 cuts packed bytes. O(1) or O(members) a call: 16,384 ranks cost what two do;
only `cuts` is about all ranks. `model_layouts` applies them to models, `fsdp` to arrays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from ref.types import InputError

Strategy: TypeAlias = Literal["fsdp1", "fsdp1-orig", "fsdp2"]
"""torch's FullyShardedDataParallel, the same with `use_orig_params=True`, and `fully_shard`."""


def fsdp2_row_range(dim0: int, *, world_size: int, rank: int) -> slice:
    """S1: the rows of a parameter that one rank holds: dim 0 in steps of `ceil(dim0 / world)`.

    The last ranks may hold a short slice or an empty one: a parameter of one row lives on rank 0 alone.
    """
    _check_rank(rank, world_size)
    step = -(-dim0 // world_size)

    return slice(min(rank * step, dim0), min((rank + 1) * step, dim0))


def packed_shape(elements: int, *, itemsize: int) -> tuple[int, int]:
    """S1, Q3: the shape of four-bit storage, `(ceil(bytes / itemsize), 1)` with two elements a byte.

    Its dim 0 knows nothing of the weight's rows or blocks: S1 cuts both.
    """
    nbytes = -(-elements // 2)

    return (-(-nbytes // itemsize), 1)


@dataclass(frozen=True)
class FlatMember:
    """S2: one parameter's place in a flat parameter."""

    name: str
    """The parameter's name."""

    shape: tuple[int, ...]
    """Its shape before flattening, which is row-major."""

    start: int
    """The index of its first element in the flat parameter."""

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """S2: a flat parameter: members in order, filler between them, a tail up to a multiple of the world size."""

    members: tuple[FlatMember, ...]
    """The parameters in registration order."""

    world_size: int
    """The number of ranks, each of which owns `size / world_size` consecutive elements."""

    size: int
    """The number of elements, filler and tail included."""

    def rank_range(self, rank: int) -> slice:
        """S2: the elements of the flat parameter that one rank owns."""
        _check_rank(rank, self.world_size)
        step = self.size // self.world_size

        return slice(rank * step, (rank + 1) * step)

    def shard(self, rank: int) -> list[tuple[str, slice]]:
        """S2: the part of each member, in its own row-major flattening, that one rank owns; empty slices included."""
        owned = self.rank_range(rank)

        return [
            (member.name, slice(*(min(max(end - member.start, 0), member.size) for end in (owned.start, owned.stop))))
            for member in self.members
        ]

    def cuts(self) -> dict[str, Int64[np.ndarray, " ends"]]:
        """S2: every rank's part of each member at once: rank k owns its elements `[cuts[k], cuts[k + 1])`."""
        ends = np.arange(self.world_size + 1, dtype=np.int64) * (self.size // self.world_size)

        return {member.name: np.clip(ends - member.start, 0, member.size) for member in self.members}


def row_layout(name: str, shape: tuple[int, ...], *, world_size: int) -> FlatLayout:
    """S1 in S2's terms: a parameter that is cut between rows is a flat parameter of one member.

    The first rank holds the most rows, and torch pads all others to as many.
    """
    most = fsdp2_row_range(shape[0], world_size=world_size, rank=0)
    size = world_size * most.stop * math.prod(shape[1:])

    return FlatLayout((FlatMember(name, shape, start=0),), world_size, size)


def flat_layout(
    members: Sequence[tuple[str, tuple[int, ...]]], *, world_size: int, alignment: int | None = None
) -> FlatLayout:
    """S2: lay parameters out in one flat parameter.

    Args:
        members: name and shape of each parameter, in registration order.
        world_size: the number of ranks.
        alignment: each member starts at a multiple of this many elements: `16 // itemsize` of the compute dtype with
            `use_orig_params=True`, None without.
    """
    _check_rank(0, world_size)
    placed: list[FlatMember] = []
    end = 0
    for name, shape in members:
        member = FlatMember(name, shape, start=up_to(end, alignment or 1))
        placed.append(member)
        end = member.start + member.size

    return FlatLayout(tuple(placed), world_size, size=up_to(end, world_size))


def wire_dtype(storage: str, *, param_dtype: str | None) -> str:
    """S6: the dtype in which packed four-bit bytes travel: always the one that they are stored in.

    FSDP casts floating parameters to `param_dtype` and leaves integers alone; packed bytes that only pretend to be
    floating numbers would become others.

    Raises:
        InputError: where `storage` is floating and `param_dtype` is another dtype.
    """
    floating = jnp.issubdtype(jnp.dtype(storage), jnp.floating)
    if floating and param_dtype is not None and jnp.dtype(param_dtype) != jnp.dtype(storage):
        raise InputError(
            f"param_dtype {param_dtype} would cast packed bytes stored as {storage}",
            hint="leave param_dtype unset for this unit, or store the bytes in that dtype",
        )

    return storage


@dataclass(frozen=True)
class UnitMember:
    """S7: what decides whether a parameter may share a unit with another."""

    name: str
    """The parameter's name."""

    dtype: str
    """The dtype that it is stored in."""

    trainable: bool
    """Whether autograd gives it a gradient."""

    castable: bool = False
    """Whether `param_dtype` may change what it travels as: a frozen dense weight or norm; never adapters (D11), packed
    bytes (S6) or biases."""


def block_units(
    members: Sequence[UnitMember], *, strategy: Strategy, param_dtype: str | None
) -> list[list[UnitMember]]:
    """S7: the units of one block that is gathered as a whole; members keep their order within each.

    FSDP2's collectives carry several dtypes at once: a block is one unit, and members that `param_dtype` would cast are
    another, since a unit has one `param_dtype`, which must reach nothing else. In FSDP1 a unit is a flat parameter, of
    one dtype, with gradients for all of it or for none: what is frozen is one unit a dtype, what trains another.
    """
    units: dict[tuple[bool, bool, str], list[UnitMember]] = {}
    for member in members:
        is_cast = member.castable and param_dtype is not None and member.dtype != param_dtype
        alike = (member.trainable, member.dtype) if strategy != "fsdp2" else (False, "")
        units.setdefault((not is_cast, *alike), []).append(member)

    return [unit for _, unit in sorted(units.items())]


def check_unit(members: Sequence[UnitMember], *, strategy: Strategy) -> None:
    """S7: one unit's parameters are gathered and reduced together, and have to be alike for it.

    A flat parameter (FSDP1) has one dtype, which is no integer one, and one `trainable` unless `use_orig_params`; FSDP2
    wants one dtype among the trainable parameters.

    Raises:
        InputError: where the members break the rule of `strategy`.
    """
    bound = [member for member in members if member.trainable or strategy != "fsdp2"]
    dtypes = sorted({member.dtype for member in bound})
    integers = [member.name for member in bound if not jnp.issubdtype(jnp.dtype(member.dtype), jnp.inexact)]

    if len(dtypes) > 1:
        raise InputError(f"one unit mixes dtypes {', '.join(dtypes)}", hint="give the adapter a unit of its own")
    if integers and strategy != "fsdp2":
        raise InputError(
            f"{integers[0]} has an integer dtype", hint="store the bytes in a floating dtype, or use fsdp2"
        )
    if strategy == "fsdp1" and len({member.trainable for member in members}) > 1:
        raise InputError("one unit mixes trainable and frozen", hint="give the adapter a unit of its own")


def up_to(count: int, multiple: int) -> int:
    """The least multiple that is no less than the count."""
    return -(-count // multiple) * multiple


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of a world of {world_size}", hint="ranks count from 0 to world_size - 1")
