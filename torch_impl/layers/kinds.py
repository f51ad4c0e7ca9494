"""The kinds of layer that DoRA is defined for here: which of them a module is, and what it has as rows (D3).

A kind is a class, `DoraLayer`'s heir, that says how it is made of the layer that it stands for, what that was, and what
PEFT calls its tensors. bitsandbytes' Linear4bit is an nn.Linear in other storage; a stack of experts is a parameter.
"""

import sys
from typing import Any, TypeAlias

from torch import nn

from torch_impl.layers.conv1d import DoraConv1D
from torch_impl.layers.convolution import DoraConvolution
from torch_impl.layers.dora import DoraLayer, DoraLinear
from torch_impl.layers.embedding import DoraEmbedding
from torch_impl.layers.experts import DoraExperts, Stack, is_stack
from torch_impl.layers.rows import Rows

Target: TypeAlias = nn.Module | Stack
"""What an adapter can be put on: a layer, or a parameter that holds a stack of them (D16)."""

KINDS: dict[str, type[DoraLayer]] = {
    kind.kind: kind for kind in (DoraLinear, DoraConv1D, DoraEmbedding, DoraConvolution, DoraExperts)
}
"""By the names that `Rows.kind` has."""


def kind_of(module: Target) -> type[DoraLayer] | None:
    """The kind that stands for a module; None where DoRA isn't defined for it here."""
    if isinstance(module, Stack) and not is_stack(module.owner, module.leaf):
        return None
    return next((kind for kind in KINDS.values() if isinstance(module, kind.standard())), None)


def rows_of(module: Target) -> Rows | None:
    """The rows of a module's weight; None for a kind that DoRA isn't defined for here."""
    kind = kind_of(module)
    return None if kind is None else kind.rows_in(module)


def own_forward(module: Target) -> bool:
    """Whether a subclass computes something else than its kind does, which an adapter in its place would not."""
    if is_linear4bit(module):
        return type(module).forward is not _linear4bit().forward
    kind = kind_of(module)
    standard = () if kind is None else kind.standard()
    layers = [known for known in standard if issubclass(known, nn.Module) and isinstance(module, known)]
    return any(type(module).forward is not known.forward for known in layers)


def is_linear(module: Target) -> bool:
    """What "all-linear" means: nn.Linear and transformers' Conv1D, as PEFT has it."""
    kind = kind_of(module)
    return kind is not None and kind.linear


def is_linear4bit(module: Target) -> bool:
    """Whether it is bitsandbytes' Linear4bit; bitsandbytes isn't imported, which takes as long as half of torch."""
    kind = _linear4bit()
    return kind is not None and isinstance(module, kind)


def _linear4bit() -> Any:
    """Bitsandbytes' class, None where nobody has imported it: then no module is one."""
    return getattr(sys.modules.get("bitsandbytes.nn"), "Linear4bit", None)
