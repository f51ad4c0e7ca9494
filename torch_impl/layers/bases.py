"""What a layer keeps frozen, each a unit of its own (S7): its weight, dense or packed in four bits, and its bias.

Axes: O output features, I input features.
Clauses: D8, Q3, Q4, S6, S7, S8.

S8: a base's forward runs what it is given, the one place where its weight is whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torch_impl.errors import StorageError
from torch_impl.layers import quant
from torch_impl.layers.cut import local


class DenseBase(nn.Module):
    """A frozen weight (O, I) in its own FSDP unit; its forward runs what it is given, while the weight is whole."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """What the whole weight decodes to, before it is sharded."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        return self.weight.dtype

    @property
    def storage(self) -> torch.dtype | None:
        """None: there are no opaque bytes here."""
        return None

    def decode(self, stored: Tensor, *, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: itself, where it has that already."""
        return stored.to(dtype)

    def matrix(self, index: int) -> tuple[Tensor, Callable[..., Tensor]]:
        """One of a stack of matrices (D16): what is stored of it, and what decodes that; for `RuleProduct`."""
        return self.weight[index], self.decode

    def forward(self, work: Callable[..., Tensor], *tensors: Any) -> Tensor:
        """S8: `work(base, *tensors)`, inside the forward of the module that owns the weight."""
        return work(self, *tensors)


class TransposedBase(DenseBase):
    """A frozen weight that is stored (I, O), as Conv1D and embeddings have it; it decodes to (O, I), a view.

    Or a stack of such matrices (E, I, O), which decodes to (E, O, I).
    """

    @property
    def shape(self) -> torch.Size:
        """What the whole weight decodes to, before it is sharded."""
        return self.weight.mT.shape

    def decode(self, stored: Tensor, *, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`, in the memory order in which it is stored."""
        return stored.mT.to(dtype)


class PackedBase(nn.Module):
    """A frozen weight in four bits: opaque bytes (n, 1), a unit of their own; every rank has the quant state (S6)."""

    def __init__(self, stored: Tensor, state: dict[str, Tensor], packed_format: quant.PackedFormat) -> None:
        super().__init__()
        self.state_names: tuple[str, ...] = ()
        self.hold(nn.Parameter(stored, requires_grad=False), state, packed_format)

    def hold(self, weight: nn.Parameter, state: dict[str, Tensor], packed_format: quant.PackedFormat) -> None:
        """Have these bytes and this quant state from now on."""
        for name in self.state_names:
            delattr(self, name)
        self.weight = weight
        self.stored_shape = weight.shape
        self.format = packed_format
        self.state_names = tuple(state)
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    @property
    def shape(self) -> torch.Size:
        """What the bytes decode to."""
        return torch.Size(self.format.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype before it was packed."""
        return self.format.dtype

    @property
    def storage(self) -> torch.dtype | None:
        """What the bytes are viewed as (Q3)."""
        return self.format.storage

    def decode(self, stored: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Q4: the dequantised weight (O, I) in `dtype`."""
        return quant.decode(stored, self.state(), self.format, dtype=dtype)

    def matrix(self, index: int) -> tuple[Tensor, Callable[..., Tensor]]:
        """One of a stack of matrices (D16), of whole blocks: its bytes, and what decodes them; for `RuleProduct`."""

        def decode(stored: Tensor, *, dtype: torch.dtype) -> Tensor:
            return quant.decode_matrix(stored, self.state(), self.format, index=index, dtype=dtype)

        return quant.bytes_of_matrix(self.weight, self.format, index=index), decode

    def state(self) -> dict[str, Tensor]:
        """The quant state's tensors by name (Q6)."""
        return {name: getattr(self, name) for name in self.state_names}

    def forward(self, work: Callable[..., Tensor], *tensors: Any) -> Tensor:
        """S8: `work(base, *tensors)`, inside the forward of the module that owns the bytes."""
        return work(self, *tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedBase":
        """S6: `model.to(dtype)` moves the bytes and the quant state, and casts neither.

        Raises:
            StorageError: the weight is sharded, and no longer this module's to move.
        """
        del recurse  # there are no children
        weight = self._parameters.get("weight")
        if weight is None or weight.shape != self.stored_shape or isinstance(weight, DTensor):
            raise StorageError("a sharded packed weight can't be moved or cast", hint="do it before shard_model")

        def move(tensor: Tensor) -> Tensor:
            return fn(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).reshape(tensor.shape)

        self.weight = nn.Parameter(move(weight.data), requires_grad=False)
        for name in self.state_names:
            setattr(self, name, move(getattr(self, name)))
        return self


class FrozenBias(nn.Module):
    """A frozen bias (O) in its own FSDP unit, so that no flat parameter mixes dtypes (S7)."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self) -> Tensor:
        """The bias in float32, in memory of its own: it outlives the unit's gathered storage."""
        return local(self.value).to(torch.float32, copy=True)
