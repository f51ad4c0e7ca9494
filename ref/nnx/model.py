"""A whole flax model: adapters on, and merged away again. D10, D12, Q7."""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from flax import nnx

from ref.nnx.config import DoRAConfig
from ref.nnx.convolution import DoRAConv
from ref.nnx.embedding import DoRAEmbed
from ref.nnx.linear import DoRALinear, DoRALinearGeneral, QDoRALinear
from ref.types import InputError

Target: TypeAlias = Callable[[tuple[Any, ...], nnx.Module], bool]
"""Which modules to adapt, by path and module."""

ADAPTED: Final = {
    nnx.Linear: DoRALinear,
    nnx.LinearGeneral: DoRALinearGeneral,
    nnx.Embed: DoRAEmbed,
    nnx.Conv: DoRAConv,
}
"""What takes the place of what; a subclass of one of these has a meaning of its own and is not taken for it."""


def linear_layers(_path: tuple[Any, ...], module: nnx.Module) -> bool:
    """Choose every linear layer: the targets that `apply_dora` has if none are given."""
    return type(module) in (nnx.Linear, nnx.LinearGeneral)


def apply_dora(model: nnx.Module, config: DoRAConfig, *, rngs: nnx.Rngs, targets: Target = linear_layers) -> Any:
    """D12: the model with an adapter on every targeted layer; its output is what it was.

    Args:
        model: any nnx model, or one layer; it stays as it is, and the new one shares its variables.
        config: of all adapters.
        rngs: `params` for the factors, `dropout` for the masks.
        targets: which layers, by path and module, for example
            `lambda path, module: linear_layers(path, module) and path[-1] != "head"`.

    Raises:
        InputError: no layer is targeted; one of a type without an adapted form is; a layer cannot be adapted, or not
            coded (QuantizationError). The message starts with the layer's path.
    """
    found = []

    def adapted(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, nnx.Module) or not targets(path, node):
            return node
        found.append(path)
        return _adapted(".".join(map(str, path)) or type(node).__name__, node, config=config, rngs=rngs)

    made = nnx.recursive_map(adapted, model)
    if not found:
        raise InputError("no layer is targeted", hint=f"`targets` may choose {', '.join(t.__name__ for t in ADAPTED)}")

    return made


def _adapted(name: str, node: nnx.Module, *, config: DoRAConfig, rngs: nnx.Rngs) -> nnx.Module:
    kind = ADAPTED.get(type(node))
    if kind is None or (config.quant_type is not None and kind is not DoRALinear):
        form = "adapted" if config.quant_type is None else "quantised and adapted"
        raise InputError(f"{name}: {type(node).__name__} has no {form} form", hint="leave it out with `targets`")
    try:
        return (kind if config.quant_type is None else QDoRALinear).from_base(node, config, rngs=rngs)
    except InputError as error:
        raise type(error)(f"{name}: {str(error).removesuffix(f'; {error.hint}')}", hint=error.hint) from error


def merge(model: nnx.Module) -> Any:
    """D10: the model with plain layers again, each with its merged weight; quantised ones stay dequantised."""
    return nnx.recursive_map(lambda _, node: node.merged() if isinstance(node, tuple(_MERGED)) else node, model)


_MERGED: Final = (*ADAPTED.values(), QDoRALinear)
