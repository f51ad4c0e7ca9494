"""PEFT's names and shapes of adapter tensors, and ours. Clauses: C1, D3.

ours                             PEFT's, after `base_model.model.`
NAME.lora_A (R, I)               NAME.lora_A.weight, of a convolution (G R, I / G, kernel)
NAME.lora_B (O, R)               NAME.lora_B.weight, of a convolution (O, R, 1 ...)
NAME.magnitude (O)               NAME.lora_magnitude_vector, of a convolution (1, O, 1 ...)
an embedding's lora_A (R, V)     NAME.lora_embedding_A
an embedding's lora_B (O, R)     NAME.lora_embedding_B
NAME.base.weight                 NAME.base_layer.weight: of an adapted embedding PEFT saves the weight as well, and
                                 loads it
NAME.STACK.lora_A (E, R, I)      NAME.lora_A.weight (E R, I) of the module's last stack of experts that is adapted, and
                                 NAME.base_layer.lora_A.weight of the one before it, as PEFT's wrappers lie
NAME.STACK.lora_B (E, O, R)      ....lora_B.weight (O, R E), the experts innermost
NAME.STACK.magnitude (E, O)      ....lora_magnitude_vector, which PEFT can't load
"""

import torch
from torch import Tensor, nn

from torch_impl.config import DoraConfig
from torch_impl.inject import refuse_target, target, target_names
from torch_impl.layers.kinds import KINDS, rows_of
from torch_impl.layers.rows import Rows

PREFIX = "base_model.model."


def target_rows(model: nn.Module, config: DoraConfig) -> dict[str, Rows]:
    """The rows of every layer that the configuration would adapt.

    Raises:
        DoraError: what `apply_dora` would refuse.
    """
    found: dict[str, Rows] = {}
    for name in target_names(model, config):
        module = target(model, name)
        refuse_target(name, module, config)
        rows = rows_of(module)
        if rows is not None:
            found[name] = rows
    return found


def adapter_shapes(layers: dict[str, Rows], config: DoraConfig) -> dict[str, tuple[int, ...]]:
    """Every adapter tensor of these layers by our name, with its shape."""
    return {
        f"{name}.{leaf}": shape for name, rows in layers.items() for leaf, shape in rows.adapter_shapes(config).items()
    }


def base_shapes(model: nn.Module, layers: dict[str, Rows], config: DoraConfig) -> dict[str, tuple[int, ...]]:
    """The base weights that a file may hold, by our names: PEFT saves an adapted embedding's beside the adapter."""
    if config.quant is not None:
        return {}
    return {f"{name}.base.weight": tuple(target(model, name).weight.shape) for name in layers}


def as_stored(name: str, tensor: Tensor, layers: dict[str, Rows]) -> tuple[str, Tensor]:
    """PEFT's name and shape of a parameter of ours; of layers in the order of registration."""
    layer, _, leaf = name.rpartition(".")
    rows = layers[layer]
    kind = KINDS[rows.kind]
    place = _wrapped(layer, layers) if rows.kind == "experts" else layer
    return f"{PREFIX}{place}.{kind.peft_names[leaf]}", kind.to_peft(leaf, tensor, rows).contiguous()


def as_ours(name: str, tensor: Tensor, layers: dict[str, Rows]) -> Tensor:
    """What PEFT's tensor is as the parameter of ours that has this name, up to axes of 1."""
    layer, _, leaf = name.rpartition(".")
    rows = layers.get(layer)
    return tensor if rows is None else KINDS[rows.kind].from_peft(leaf, tensor, rows)


def stored_names(shapes: dict[str, tuple[int, ...]], layers: dict[str, Rows]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name and PEFT's shape of every adapter tensor, by PEFT's name."""
    found = {name: as_stored(name, torch.empty(shape, device="meta"), layers) for name, shape in shapes.items()}
    return {key: (name, tuple(tensor.shape)) for name, (key, tensor) in found.items()}


def _wrapped(stack: str, layers: dict[str, Rows]) -> str:
    """Where PEFT's wrapper of a stack of experts lies: each later one of the module is around it."""
    owner = stack.rpartition(".")[0]
    siblings = [name for name, rows in layers.items() if rows.kind == "experts" and name.rpartition(".")[0] == owner]
    return owner + ".base_layer" * (len(siblings) - 1 - siblings.index(stack))


def own_name(key: str) -> str:
    """Our name of a tensor in PEFT's file; PEFT's older spellings are understood."""
    name = key.removeprefix(PREFIX)
    if name.endswith(".base_layer.weight"):
        return name.removesuffix("base_layer.weight") + "base.weight"
    layer, _, leaf = name.removesuffix(".weight").removesuffix(".default").rpartition(".")
    own = {"lora_magnitude_vector": "magnitude", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
    return f"{layer}.{own.get(leaf, leaf)}" if layer else leaf
