"""S10: a layer whose features are cut over tensor ranks: what each has of it, and the collectives of its forward.

Axes: T tokens, I in, O out, R adapter rank; small letters (o, i) are a tensor rank's part.

    column    W[p] (o, I)   A (R, I)      B[p] (o, R)   m[p], b[p] (o)     y[p] = c[p] * (x V[p]') + b[p]
    row       W[p] (O, i)   A[p] (R, i)   B (O, R)      m, b (O)           y = c * sum_p (x[p] V[p]') + b
    whole     all of it on every rank

    column    forward   none; the norm is local
              backward  one all-reduce: dx and dA are sums of what each rank's rows give
    row       forward   one all-reduce of n^2's terms (D13), one of x W' and h = x A', before c, s and b
              backward  none: what c and B meet is whole, so dm and dB are

Where a neighbour wants the other form, features are gathered or sliced between: a column's outputs, a row's inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torch_impl.errors import ShardingError

Along = Literal["column", "row", "whole"]


@dataclass(frozen=True, eq=False)
class Cut:
    """How a layer lies on the ranks of a mesh of one dimension."""

    along: Along
    """Whether its rows are dealt, or its row's numbers, or nothing."""
    mesh: DeviceMesh
    """The tensor ranks."""
    whole_outside: bool = False
    """Whether a column's outputs are gathered and a row's inputs sliced, since others have them whole."""

    _met: list[bool] = field(default_factory=list)

    def is_first_time(self) -> bool:
        """Whether nobody has asked before: what a check of every step would be too slow for is checked then."""
        first = not self._met
        self._met[:] = [True]
        return first

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.mesh.size()

    @property
    def splits_rows(self) -> bool:
        """Whether the numbers of each row lie on several ranks, so that sums over them need all."""
        return self.along == "row"

    def placement(self, leaf: str) -> Placement:
        """S10: where a layer's tensor lies: `weight`, `lora_A`, `lora_B`, `magnitude` or `bias`."""
        dims = {"column": {"lora_A": None, "weight": 0}, "row": {"weight": 1, "lora_A": 1}, "whole": {}}
        dim = dims[self.along].get(leaf, 0 if self.along == "column" else None)
        return Replicate() if dim is None else Shard(dim)

    def enter(self, x: Float[Tensor, "... K"]) -> Tensor:
        """The input as the layer's part reads it."""
        return self._moved(x, Replicate(), Shard(x.dim() - 1)) if self.splits_rows and self.whole_outside else x

    def leave(self, y: Float[Tensor, "... K"]) -> Tensor:
        """The output as others read it."""
        gathers = self.along == "column" and self.whole_outside
        return self._moved(y, Shard(y.dim() - 1), Replicate()) if gathers else y

    def _moved(self, x: Tensor, held: Placement, wanted: Placement) -> Tensor:
        """By torch's own pair of a collective and its transpose."""
        moved = DTensor.from_local(x, self.mesh, [held], run_check=False).redistribute(placements=[wanted])
        return cast("Tensor", moved.to_local())

    def own(self, whole: Tensor) -> Tensor:
        """This rank's features of something that every rank has whole, the last axis; a view."""
        width = whole.shape[-1] // self.ranks
        return whole.narrow(-1, self.mesh.get_local_rank() * width, width)

    def sums(self, *parts: Tensor, alike: Tensor | None = None) -> Sequence[Tensor]:
        """Each part's sum over the tensor ranks, in its shape and dtype: one collective, in float32 or wider.

        Every rank gets the same bits.

        Args:
            parts: of any shapes and floating dtypes.
            alike: what every rank must have to the bit, checked on the way.

        Raises:
            ShardingError: some rank has another.
        """
        marks = parts[0].new_zeros(self.ranks, dtype=torch.float32)  # each rank its own
        if alike is not None:
            marks[self.mesh.get_local_rank()] = _mark(alike)
        parts = (*parts, marks)
        wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        flat = torch.cat([part.reshape(-1).to(wide) for part in parts])
        distributed.all_reduce(flat, group=self.mesh.get_group())
        split = flat.split([part.numel() for part in parts])
        *sums, marks = [whole.reshape(part.shape).to(part.dtype) for part, whole in zip(parts, split, strict=True)]
        if alike is not None and bool((marks != marks[0]).any()):
            raise ShardingError(
                "tensor ranks have unlike copies of one tensor", hint="give all of them the same batch, seed and text"
            )
        return sums


def _mark(tensor: Tensor) -> float:
    """A number of its bits that float32 holds."""
    whole_numbers = torch.int32 if tensor.dtype.itemsize == torch.int32.itemsize else torch.int16
    return float(tensor.detach().contiguous().view(whole_numbers).sum() & 0xFFFF)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, whose gradient lies likewise: itself, where it isn't cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    return cast("Tensor", tensor.to_local(grad_placements=tensor.placements))
