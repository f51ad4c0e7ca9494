"""`apply_dora`: replace every targeted linear layer of a model by a `DoraLinear`, and freeze the rest.

Clauses: D1, D6, Q7. Targets are read as PEFT reads them.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from torch_impl import quant
from torch_impl.config import ALL_LINEAR, COMPUTE_DTYPES, DoraConfig, QuantConfig
from torch_impl.errors import DtypeError, RankError, TargetError
from torch_impl.layers import DenseBase, DoraLinear, PackedBase
from torch_impl.phases import timed


def apply_dora(model: nn.Module, config: DoraConfig) -> nn.Module:
    """Put a DoRA adapter on every targeted layer; everything else is frozen.

    A is Kaiming-uniform(a = sqrt 5) from torch's default generator, B is zero, m is D6's, so that the model computes
    what it did (D12).

    Args:
        model: any torch model; nn.Linear and bitsandbytes' Linear4bit can be targets. It is changed in place.
        config: the adapter.

    Returns:
        The same model.

    Raises:
        TargetError: `target_modules` match nothing, or something that is no such linear layer.
        RankError: the rank is larger than both sides of a target.
        NonFiniteError: a target's weight or bias holds NaN or infinity.
        DtypeError: a target's dtype can't be computed in, and no `compute_dtype` was given.
    """
    names = list(target_names(model, config))
    targets = [model.get_submodule(name) for name in names]
    for name, linear in zip(names, targets, strict=True):
        refuse_target(name, linear, config)
    made = {id(linear): dora_linear(linear, config, name=name) for name, linear in zip(names, targets, strict=True)}
    model.requires_grad_(False)
    for name, linear in zip(names, targets, strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[id(linear)])
    return model


def dora_linear(linear: nn.Linear, config: DoraConfig, *, name: str = "") -> DoraLinear:
    """One DoRA layer over one linear layer; its weight is shared where it stays dense."""
    if linear.bias is not None:
        quant.refuse_non_finite(linear.bias, f"{name}.bias")
    with timed("quantise" if config.quant else "take over"):
        base = _base(linear, config.quant_config, name=f"{name}.weight")
    if config.compute_dtype is None and base.dtype not in COMPUTE_DTYPES:
        raise DtypeError(f"{name}.weight is {base.dtype}", hint=f"set compute_dtype to one of {COMPUTE_DTYPES}")
    with timed("adapters"):
        return DoraLinear(base, linear.bias, config).train(linear.training)


def _base(linear: nn.Linear, config: QuantConfig | None, *, name: str) -> DenseBase | PackedBase:
    """The frozen base in the storage asked for; a weight that bitsandbytes has packed keeps its bytes and state."""
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        packed = linear.weight.data
        storage = packed.dtype if config is None else config.quant_storage
        stored, tensors, packed_format = quant.from_quant_state(packed, state, storage=storage)
        base = PackedBase(stored, tensors, packed_format)
        if not quant.is_finite(tensors, packed_format):
            quant.refuse_non_finite(base.decode(base.weight, dtype=torch.float32), name)
        return base
    if config is None and isinstance(linear, Linear4bit):
        config = _linear4bit_config(linear)
    if config is not None:
        return PackedBase(*quant.quantize(linear.weight, config, name=name))
    quant.refuse_non_finite(linear.weight, name)
    return DenseBase(linear.weight)


def _linear4bit_config(linear: Linear4bit) -> QuantConfig:
    """The storage that a Linear4bit would take when moved to its device."""
    weight = linear.weight
    return QuantConfig(weight.quant_type, weight.blocksize, weight.compress_statistics, weight.quant_storage)


def target_names(model: nn.Module, config: DoraConfig) -> Iterator[str]:
    """The full names of the targets, aliases included.

    Raises:
        TargetError: there are none, or one isn't a linear layer.
    """
    wanted = config.target_modules
    excluded = _output_embedding(model)
    count = 0
    for name, module in model.named_modules(remove_duplicate=False):
        if not _matches(name, wanted) or (
            wanted == ALL_LINEAR and (not isinstance(module, nn.Linear) or module is excluded)
        ):
            continue
        count += 1
        yield name
    if not count:
        some = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:3]
        raise TargetError(f"target_modules {wanted!r} match nothing", hint=f"linear layers here are {some or 'none'}")


def _matches(name: str, wanted: str | Collection[str]) -> bool:
    """PEFT's reading: a string is a regular expression for the whole name, others are names or their endings."""
    if wanted == ALL_LINEAR:
        return name != ""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, which "all-linear" leaves alone."""
    find: Any = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def refuse_target(name: str, module: nn.Module, config: DoraConfig) -> None:
    """Refuse what can be told from shapes and types, before anything is changed.

    Raises:
        TargetError: the module is no linear layer inside a model.
        RankError: the rank is larger than both its sides.
    """
    if not isinstance(module, nn.Linear) or name == "":
        raise TargetError(
            f"{name or 'the model itself'} is a {type(module).__name__}",
            hint="target nn.Linear layers inside the model",
        )
    if config.rank > max(module.in_features, module.out_features):
        shape = (module.out_features, module.in_features)
        raise RankError(
            f"rank {config.rank} is larger than both sides of {name}, {shape}", hint=f"use at most {max(shape)}"
        )
