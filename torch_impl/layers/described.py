"""A weight that can be asked what it is, and not be computed with.

Models ask their layers: T5 casts to `wo.weight.dtype`. Some multiply by a layer's weight themselves, as Mamba does, and
an adapter in that layer's place would be passed over without a word: that raises.
"""

from typing import Any

import torch
from torch import Tensor

from torch_impl.errors import TargetError


class Described(Tensor):
    """A shape, a dtype and a device, without numbers."""

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Described":
        """Make one."""
        return Tensor._make_wrapper_subclass(Described, shape, dtype=dtype, device=device)  # noqa: SLF001 - torch's way

    def __repr__(self, **_: Any) -> str:
        """Without numbers, too."""
        return f"{type(self).__name__}{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever computes with it comes here.

        Raises:
            TargetError: always.
        """
        del types, args, kwargs
        raise TargetError(
            f"{operation} is asked of an adapted layer's weight: the model computes past its adapter",
            hint="leave that layer out of target_modules",
        )
