"""Plain layers again: every DoRA layer becomes the layer that it replaced, with the weight c * V. Clause: D10."""

from typing import Any

import torch
from torch import nn

from torch_impl.errors import ShardingError
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.experts import DoraExperts, give_back
from torch_impl.wrappers import is_sharded


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """D10: plain layers with weight c * V, formed in float32 and rounded once to the base weight's dtype.

    A packed base yields a dense weight: re-quantising is another, lossy operation. The model is changed in place; where
    one of its tied embeddings has been merged it says from now on that they are not tied.

    Raises:
        ShardingError: the model is sharded.
    """
    if is_sharded(model):
        raise ShardingError(
            "a sharded model can't be merged", hint="save_adapter, then load_adapter on an unsharded model"
        )
    made: dict[int, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, DoraLayer):
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            if isinstance(layer, DoraExperts):  # a module with two names has it back already, the second time
                if leaf in owner._modules:  # noqa: SLF001 - its own
                    give_back(owner, leaf, layer.merged_weight().to(layer.base.dtype))
                continue
            made[id(layer)] = made.get(id(layer)) or _merged(layer)
            setattr(owner, leaf, made[id(layer)])
    if _ties_broken(model):
        model.config.tie_word_embeddings = False
    return model


def _merged(layer: DoraLayer) -> nn.Module:
    """One layer as the plain one of its kind."""
    weight = layer.merged_weight().to(layer.base.dtype)
    plain: Any = layer.plain()
    stored = weight.T.contiguous() if layer.transposed else weight
    plain.weight = nn.Parameter(stored, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.value.detach().clone(), requires_grad=False)
    return plain.train(layer.training)


def _ties_broken(model: Any) -> bool:
    """Whether a model that says that its embeddings are tied has two weights by now."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    return first is not None and last is not None and first.weight.data_ptr() != last.weight.data_ptr()
