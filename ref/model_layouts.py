"""A whole model's layouts: units in, any rank's part of any parameter out.

Clauses S1 and S2 (how a unit is cut) and S7 (what a unit is). A part is a range of elements of the parameter's own
row-major flattening, whatever the strategy. What may be asked of a `ModelLayout`:

    shard(rank)   one rank's part of every parameter
    cuts()        all ranks' parts of one parameter after another, in arrays over ranks
    held()        how many elements each rank holds
    units         one unit's flat parameters, which answer for themselves, padding included
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int64

from ref.layouts import FlatLayout, Strategy, flat_layout, row_layout
from ref.types import InputError

ALIGNED_BYTES: Final = 16
"""S2: with `use_orig_params=True` each member of a flat parameter starts at a multiple of this."""


@dataclass(frozen=True)
class Unit:
    """S7: parameters that are gathered and freed together."""

    name: str
    """The module around whose forward they are gathered."""

    members: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each parameter, in registration order."""

    itemsize: int
    """The bytes of one element in the compute dtype: `param_dtype` if set."""


@dataclass(frozen=True)
class ModelLayout:
    """S1, S2: which rank holds what of a model."""

    units: Mapping[str, tuple[FlatLayout, ...]]
    """Each unit's flat parameters, by the unit's name: one under FSDP1, one a parameter under FSDP2."""

    world_size: int
    """The number of ranks."""

    def shard(self, rank: int) -> dict[str, slice]:
        """S1, S2: the part of every parameter that one rank holds, by the parameter's name; empty ones included."""
        return {name: part for flat in self._flats() for name, part in flat.shard(rank)}

    def cuts(self) -> Iterator[tuple[str, Int64[np.ndarray, " ends"]]]:
        """S1, S2: every parameter's name and cuts: rank k holds its elements `[cuts[k], cuts[k + 1])`."""
        return (item for flat in self._flats() for item in flat.cuts().items())

    def held(self) -> Int64[np.ndarray, " world"]:
        """The number of elements that each rank holds, filler and padding apart."""
        return sum((np.diff(cuts) for _, cuts in self.cuts()), start=np.zeros(self.world_size, np.int64))

    def _flats(self) -> Iterator[FlatLayout]:
        return (flat for flats in self.units.values() for flat in flats)


def model_layout(units: Sequence[Unit], *, strategy: Strategy, world_size: int) -> ModelLayout:
    """S1, S2: lay out every unit of a model, in a time that does not grow with the world.

    Args:
        units: each parameter in one of them; a tied parameter once.
        strategy: how units are cut.
        world_size: the number of ranks that share one copy of the parameters.

    Raises:
        InputError: where a name stands twice, or a parameter has no dimension to cut.
    """
    _check(units)
    return ModelLayout(
        {unit.name: _flat_parameters(unit, strategy=strategy, world_size=world_size) for unit in units}, world_size
    )


def _flat_parameters(unit: Unit, *, strategy: Strategy, world_size: int) -> tuple[FlatLayout, ...]:
    if strategy == "fsdp2":
        return tuple(row_layout(name, shape, world_size=world_size) for name, shape in unit.members)
    alignment = ALIGNED_BYTES // unit.itemsize if strategy == "fsdp1-orig" else None

    return (flat_layout(unit.members, world_size=world_size, alignment=alignment),)


def _check(units: Sequence[Unit]) -> None:
    members = [member for unit in units for member in unit.members]
    for kind, names in (("unit", [unit.name for unit in units]), ("parameter", [name for name, _ in members])):
        if len(set(names)) < len(names):
            twice = next(name for position, name in enumerate(names) if name in names[:position])
            raise InputError(f"{kind} {twice!r} is there twice", hint="lay out what is shared once")
    for name, shape in members:
        if not shape:
            raise InputError(f"{name} has no dimension", hint="give it the shape (1,), as FSDP wants it")
