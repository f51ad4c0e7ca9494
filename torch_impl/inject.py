"""`apply_dora`: replace every targeted layer of a model by a DoRA layer of its kind, and freeze the rest.

Clauses: D1, D3, D6, D16, Q7. Targets are read as PEFT reads them.
"""

import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import nn

from torch_impl.config import ALL_LINEAR, COMPUTE_DTYPES, DoraConfig, QuantConfig
from torch_impl.errors import DtypeError, RankError, StorageError, TargetError
from torch_impl.layers import quant
from torch_impl.layers.bases import DenseBase, PackedBase, TransposedBase
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.experts import DoraExperts, Stack, is_stack, lend
from torch_impl.layers.kinds import Target, is_linear, is_linear4bit, kind_of, own_forward, rows_of
from torch_impl.timing import timed


def apply_dora(model: nn.Module, config: DoraConfig) -> nn.Module:
    """Put a DoRA adapter on every targeted layer; everything else is frozen.

    A is Kaiming-uniform(a = sqrt 5) from torch's default generator, B is zero (an embedding's A zero, its B standard
    normal), m is D6's, so that the model computes what it did (D12).

    Args:
        model: any torch model; nn.Linear, bitsandbytes' Linear4bit, transformers' Conv1D, nn.Embedding and nn.Conv1d to
            3d can be targets, and the stacks of experts that `target_parameters` names. It is changed in place.
        config: the adapter.

    Returns:
        The same model.

    Raises:
        TargetError: `target_modules` match nothing, or something that is no such layer; the model has adapters already,
            or weights on the meta device.
        RankError: the rank is larger than both sides of a target.
        StorageError: an embedding or a convolution can't be packed.
        NonFiniteError: a target's weight or bias holds NaN or infinity.
        DtypeError: a target's dtype can't be computed in, and no `compute_dtype` was given.
    """
    _refuse_unready(model)
    names = list(target_names(model, config))
    targets = [target(model, name) for name in names]
    for name, module in zip(names, targets, strict=True):
        refuse_target(name, module, config)
    _warn_of_experts(model, config, names)
    made = {module: dora_linear(module, config, name=name) for name, module in zip(names, targets, strict=True)}
    model.requires_grad_(False)
    for name, module in zip(names, targets, strict=True):
        put(model, name, module, made[module])
    return model


def target(model: nn.Module, name: str) -> Target:
    """What a name stands for: a module, or a parameter of one."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    return Stack(owner, leaf) if leaf in owner._parameters else model.get_submodule(name)  # noqa: SLF001


def put(model: nn.Module, name: str, module: Target, layer: DoraLayer) -> None:
    """Put a layer in its target's place; under a second name of one module, too."""
    parent, _, leaf = name.rpartition(".")
    if isinstance(module, Stack):
        lend(module, cast("DoraExperts", layer))
    else:
        setattr(model.get_submodule(parent), leaf, layer)


def _warn_of_experts(model: nn.Module, config: DoraConfig, names: Collection[str]) -> None:
    """D16: "all-linear" means modules; say so where most of a model's weights are parameters of experts."""
    left = [name for name in stacks(model) if name not in names]
    if config.target_modules == ALL_LINEAR and left:
        leaves = sorted({name.rpartition(".")[2] for name in left})
        warnings.warn(
            f'"all-linear" leaves {len(left)} stacks of experts as they are, {left[0]} among them: '
            f"name them by target_parameters={leaves}",
            stacklevel=3,
        )


def stacks(model: nn.Module) -> Iterator[str]:
    """The names of all parameters that hold a stack of experts' matrices."""
    for name, module in model.named_modules():
        for leaf in module._parameters:  # noqa: SLF001 - its own
            if is_stack(module, leaf):
                yield f"{name}.{leaf}"


def _refuse_unready(model: nn.Module) -> None:
    """What has adapters already would keep them frozen, and what lies on meta has no norm to start from."""
    for name, module in model.named_modules():
        if isinstance(module, DoraLayer):
            raise TargetError(f"{name} has an adapter already", hint="name all targets in one call of apply_dora")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TargetError(
                f"{name} is on the meta device: its norm, where the magnitude starts (D6), is unknown",
                hint="load the weights first, or use torch_impl.files.materialize.materialize",
            )


def dora_linear(module: Target, config: DoraConfig, *, name: str = "") -> DoraLayer:
    """One DoRA layer over one layer of any kind; its weight is shared where it stays dense.

    Raises:
        TargetError: the module is of no kind that DoRA is defined for here.
    """
    kind = kind_of(module)
    if kind is None:
        raise TargetError(f"{name or 'the layer'} is a {type(module).__name__}", hint="see apply_dora for what can be")
    bias = getattr(module, "bias", None)
    if bias is not None:
        quant.refuse_non_finite(bias, f"{name}.bias")
    with timed("quantise" if config.quant else "take over"):
        base = _base(
            module, config.quant_config, name=_weight_name(name, module), transposed=kind.stores_transposed(module)
        )
    if config.compute_dtype is None and base.dtype not in COMPUTE_DTYPES:
        raise DtypeError(
            f"{_weight_name(name, module)} is {base.dtype}", hint=f"set compute_dtype to one of {COMPUTE_DTYPES}"
        )
    with timed("adapters"):
        return kind.over(module, base, config).train(module.training)


def _weight_name(name: str, module: Target) -> str:
    """What a message calls the target's weight."""
    return name if isinstance(module, Stack) else f"{name}.weight"


def _base(module: Any, config: QuantConfig | None, *, name: str, transposed: bool) -> DenseBase | PackedBase:
    """The frozen base in the storage asked for; a weight that bitsandbytes has packed keeps its bytes and state.

    A transposed weight is packed as (O, I), as transformers does with bitsandbytes.
    """
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        packed = module.weight.data
        storage = packed.dtype if config is None else config.quant_storage
        stored, tensors, packed_format = quant.from_quant_state(packed, state, storage=storage)
        base = PackedBase(stored, tensors, packed_format)
        if not quant.is_finite(tensors, packed_format):
            quant.refuse_non_finite(base.decode(base.weight, dtype=torch.float32), name)
        return base
    if config is None and is_linear4bit(module):
        config = _linear4bit_config(module)
    if config is not None:
        return PackedBase(*quant.quantize(module.weight.mT if transposed else module.weight, config, name=name))
    quant.refuse_non_finite(module.weight, name)
    return TransposedBase(module.weight) if transposed else DenseBase(module.weight)


def _linear4bit_config(linear: Any) -> QuantConfig:
    """The storage that a Linear4bit would take when moved to its device."""
    weight = linear.weight
    return QuantConfig(weight.quant_type, weight.blocksize, weight.compress_statistics, weight.quant_storage)


def target_names(model: nn.Module, config: DoraConfig) -> Iterator[str]:
    """The full names of the targets in the order of registration, aliases of modules included.

    Raises:
        TargetError: there are none.
    """
    wanted, parameters = config.target_modules, config.target_parameters
    excluded = _output_embedding(model)
    count = 0
    for name, module in model.named_modules(remove_duplicate=False):
        left = wanted == ALL_LINEAR and (not is_linear(module) or module is excluded)
        own = [] if left or not _matches(name, wanted) else [name]
        full = [f"{name}.{leaf}".lstrip(".") for leaf in module._parameters]  # noqa: SLF001 - its own
        own += [name for name in full if parameters and _matches(name, parameters)]
        count += len(own)
        yield from own
    if not count:
        some = [name for name, module in model.named_modules() if is_linear(module)][:3]
        what = f"target_modules {wanted!r}" + (f" and target_parameters {parameters!r}" if parameters else "")
        raise TargetError(f"{what} match nothing", hint=f"linear layers here are {some or 'none'}")


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


def refuse_target(name: str, module: Target, config: DoraConfig) -> None:
    """Refuse what can be told from shapes and types, before anything is changed.

    Raises:
        TargetError: the module is of no kind that DoRA is defined for here, or has options that aren't honoured.
        RankError: the rank is larger than both sides of its weight, or of one group's part of it.
        StorageError: it is to be packed, and is no linear layer.
    """
    if isinstance(module, Stack):
        _refuse_stack(name, module, config)
    rows = rows_of(module)
    kind = type(module).__name__
    if rows is None or name == "":
        raise TargetError(
            f"{name or 'the model itself'} is a {kind}",
            hint="target nn.Linear, Conv1D, nn.Embedding or nn.Conv1d to 3d inside the model",
        )
    if own_forward(module):
        raise TargetError(
            f"{name} is a {kind}, whose forward is its own", hint="leave it out: its adapter would compute without it"
        )
    weight: Any = getattr(module, "weight", None)
    if weight is not None and not weight.dtype.is_floating_point and not is_linear4bit(module):
        raise TargetError(
            f"{name}.weight is {weight.dtype}, and means nothing without its scales",
            hint="load the model unquantised, or in bitsandbytes' 4 bits",
        )
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option, None):
            raise TargetError(
                f"{name} has {option}={getattr(module, option)}",
                hint="unset it: an adapted embedding has no such option",
            )
    adapts = kind_of(module)
    if config.quant is not None and adapts is not None and not adapts.packs:
        raise StorageError(
            f"quant {config.quant!r} can't store {name}, a {kind}", hint="target linear layers alone, or use quant=None"
        )
    if config.rank > max(rows.matrix):
        parts = "experts" if isinstance(module, Stack) else "groups"
        part = f" (one of {rows.groups} {parts})" if rows.groups > 1 else ""
        raise RankError(
            f"rank {config.rank} is larger than both sides of {name}, {rows.matrix}{part}",
            hint=f"use at most {max(rows.matrix)}",
        )


def _refuse_stack(name: str, stack: Stack, config: DoraConfig) -> None:
    """D16: what isn't a stack of experts' matrices of known orientation, or can't be packed matrix by matrix."""
    owner = type(stack.owner).__name__
    if not is_stack(stack.owner, stack.leaf):
        raise TargetError(
            f"{name} {tuple(stack.weight.shape)} is no stack of experts that transformers says the orientation of, but "
            f"a parameter of a {owner}",
            hint="name experts' 3-D parameters in target_parameters, layers in target_modules",
        )
    quant_config, numbers = config.quant_config, stack.weight[0].numel()
    if quant_config is not None and numbers % quant_config.blocksize:
        raise StorageError(
            f"an expert of {name} has {numbers} numbers, no whole blocks of {quant_config.blocksize}",
            hint="use a smaller blocksize, or leave it out",
        )
