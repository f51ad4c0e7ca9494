"""Tensor parallel: which of a model's layers are cut how, by its plan, and the cutting itself.

Clauses: S10 (columns, rows, what stays whole), Q1, Q6 (packed weights are cut between blocks), S6.

A *plan* gives a style to each layer, by its name or a pattern in which `*` is a part of one. The styles are
transformers', whose models have a plan of their own (`model.tp_plan`):

    colwise                  output rows are dealt; the input is whole, the output a rank's features
    colwise_gather_output    the same, and the output is gathered
    rowwise                  each row's numbers are dealt; the input is a rank's features, the output whole
    rowwise_split_input      the same of a whole input
    replicate                whole, input and output too

Adapted layers are cut by `Cut`; a plain linear layer with `colwise` or `rowwise` by torch's own `parallelize_module`,
since what computes between a pair reads its number of features; everything else stays whole. Nothing is coded again.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torch_impl.config import DoraConfig, ShardConfig
from torch_impl.errors import ShardingError, StorageError
from torch_impl.inject import target, target_names
from torch_impl.layers import quant
from torch_impl.layers.bases import PackedBase
from torch_impl.layers.cut import Along, Cut
from torch_impl.layers.dora import DoraLayer, DoraLinear
from torch_impl.layers.kinds import kind_of, rows_of

STYLES: dict[str, tuple[Along, bool]] = {
    "colwise": ("column", False),
    "colwise_gather_output": ("column", True),
    "colwise_rep": ("column", True),
    "rowwise": ("row", False),
    "rowwise_split_input": ("row", True),
    "rowwise_rep": ("row", True),
    "replicate": ("whole", False),
}
"""What each style cuts, and whether its neighbours have whole features all the same."""
_LEFT_WHOLE = ("embedding_rowwise", "embedding_colwise", "sequence_parallel", "replicated_with_grad_allreduce")
"""Styles of what trains nothing and gives the same where it is whole."""


def tensor_styles(model: nn.Module, config: ShardConfig) -> dict[str, str]:
    """The style of every module that the plan names, by its full name.

    Args:
        model: with DoRA layers, not sharded.
        config: its `tensor_plan` counts before the model's own `tp_plan`.

    Raises:
        ShardingError: there is no plan, or a pattern of the user's matches nothing.
    """
    own: Mapping[str, str] = cast("Any", getattr(model, "tp_plan", None)) or {}
    given = config.tensor_plan or {}
    if not own and not given:
        raise ShardingError(
            f"{config.strategy} has no plan for a {type(model).__name__}",
            hint='give ShardConfig(tensor_plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"}), say',
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    styles: dict[str, str] = {}
    for pattern, style in (*own.items(), *given.items()):
        known = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        found = [name for name in names if known.fullmatch(name)]
        if not found and pattern in given:
            raise ShardingError(f"tensor_plan's {pattern!r} matches nothing", hint="correct it, or leave it out")
        styles |= dict.fromkeys(found, style)
    return styles


@dataclass(frozen=True)
class _Adapted:
    """What decides whether tensor ranks can share a layer that has an adapter, or is to have one."""

    kind: type[DoraLayer] | None
    out: int
    fan_in: int
    blocksize: int | None
    """Of its packed weight (Q1); None where that is dense."""


def refuse_uncuttable(model: nn.Module, config: ShardConfig, *, ranks: int, dora: DoraConfig | None = None) -> None:
    """Refuse what can't be cut, before anything is.

    Args:
        model: with DoRA layers; or without, be it on the meta device, and with `dora`: what is to be put on it.
        config: with its plan.
        ranks: tensor ranks.
        dora: adapters that are to come; None where the model has them.

    Raises:
        ShardingError: no plan, a layer without a style, a style or kind of layer that isn't known here, features that
            don't divide among the ranks, or something else than adapters that trains.
        StorageError: a packed weight whose parts would not be of whole blocks.
    """
    styles = tensor_styles(model, config)
    layers = dict(_there(model) if dora is None else _to_come(model, dora))
    for name in layers:
        if name not in styles:
            raise ShardingError(
                f"{config.strategy} has no style for the adapted layer {name}",
                hint="name it in tensor_plan, as `replicate` where its input and output are whole, or don't adapt it",
            )
    _refuse_heads(model, styles, ranks=ranks)
    for name, style in styles.items():
        module = model.get_submodule(name)
        if name in layers:
            _refuse_layer(name, layers[name], style, ranks=ranks)
        elif _cuts_plain(style):
            _refuse_plain(name, module, style, ranks=ranks)
        elif style not in STYLES and style not in _LEFT_WHOLE and not _holds_experts(module):
            raise ShardingError(f"{name} is {style!r} in the plan, which isn't known here", hint="give a tensor_plan")
    inside = tuple(f"{name}." for name in layers)
    for name, parameter in model.named_parameters() if dora is None else ():
        if parameter.requires_grad and not name.startswith(inside):
            raise ShardingError(
                f"{name} trains, and {config.strategy} knows no gradient of it but adapters'", hint="freeze it"
            )


def _there(model: nn.Module) -> Iterator[tuple[str, _Adapted]]:
    """The adapted layers of a model."""
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLayer):
            blocksize = layer.base.format.blocksize if isinstance(layer.base, PackedBase) else None
            yield name, _Adapted(type(layer), layer.rows.out, layer.rows.length, blocksize)


def _to_come(model: nn.Module, dora: DoraConfig) -> Iterator[tuple[str, _Adapted]]:
    """Those that it is to have."""
    blocksize = None if dora.quant_config is None else dora.quant_config.blocksize
    for name in target_names(model, dora):
        module = target(model, name)
        rows = rows_of(module)
        if rows is not None:
            yield name, _Adapted(kind_of(module), rows.out, rows.length, blocksize)


def _holds_experts(module: nn.Module) -> bool:
    """Whether it is a module of fused experts: their input and output are whole, and so may they be."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))  # noqa: PLR2004 - (E, O, I)


def _refuse_heads(model: nn.Module, styles: Mapping[str, str], *, ranks: int) -> None:
    """Attention views its features as heads, and a rank must have whole ones."""
    config: Any = getattr(model, "config", None)
    attends = any("attn" in name and STYLES.get(style, ("whole",))[0] == "column" for name, style in styles.items())
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if attends and isinstance(heads, int) and heads % ranks:
            raise ShardingError(f"{what} {heads} don't divide among {ranks} tensor ranks", hint=_divisors(heads))


def _divisors(number: int) -> str:
    """What would do instead."""
    found = [size for size in range(2, number + 1) if number % size == 0]
    return f"use a tensor_size of {' or '.join(map(str, found))}" if found else "it can't be cut"


def _refuse_layer(name: str, layer: _Adapted, style: str, *, ranks: int) -> None:
    """S10 of one adapted layer."""
    if style not in STYLES:
        raise ShardingError(f"{name} is {style!r} in the plan", hint=f"adapted layers can be {', '.join(STYLES)}")
    along, _ = STYLES[style]
    if along == "whole":
        return
    if layer.kind is not DoraLinear:
        kind = "layer" if layer.kind is None else layer.kind.__name__
        raise ShardingError(f"{name} is a {kind}, which tensor ranks can't share", hint="don't adapt it, or use fsdp2")
    _refuse_features(name, layer.out, layer.fan_in, along, ranks=ranks)
    part = layer.out // ranks * layer.fan_in if along == "column" else layer.fan_in // ranks
    if layer.blocksize is not None and part % layer.blocksize:
        what = f"{layer.out // ranks} rows of {layer.fan_in}" if along == "column" else f"{part} numbers of each row"
        raise StorageError(
            f"{name}: a tensor rank's {what} are no whole blocks of {layer.blocksize}",
            hint="use a smaller blocksize or tensor_size",
        )


def _refuse_features(name: str, out: int, fan_in: int, along: Along, *, ranks: int) -> None:
    features = out if along == "column" else fan_in
    if features % ranks:
        what = "output" if along == "column" else "input"
        raise ShardingError(
            f"{name}'s {features} {what} features don't divide among {ranks} tensor ranks", hint=_divisors(features)
        )


def _cuts_plain(style: str) -> bool:
    """Whether others count on a plain layer's being cut: their features are a rank's."""
    return style in ("colwise", "rowwise")


def _refuse_plain(name: str, module: nn.Module, style: str, *, ranks: int) -> None:
    """S10 of a layer without an adapter."""
    if _holds_experts(module):
        return
    if type(module) is not nn.Linear:
        raise ShardingError(
            f"{name} is a {type(module).__name__} that the plan cuts {style}, and only nn.Linear can be without an "
            "adapter",
            hint="adapt it too, or give a tensor_plan",
        )
    _refuse_features(name, module.out_features, module.in_features, STYLES[style][0], ranks=ranks)


def cut_tensors(model: nn.Module, config: ShardConfig, mesh: DeviceMesh) -> None:
    """Cut every layer that the plan names; `refuse_uncuttable` has passed it.

    Args:
        model: with DoRA layers, whole and alike on every rank; changed in place.
        config: with its plan.
        mesh: the tensor ranks, of one dimension.
    """
    for name, style in tensor_styles(model, config).items():
        module = model.get_submodule(name)
        if isinstance(module, DoraLayer):
            along, whole_outside = STYLES[style]
            _cut_layer(module, Cut(along, mesh, whole_outside))
        elif _cuts_plain(style) and type(module) is nn.Linear:
            parallelize_module(module, mesh, ColwiseParallel() if style == "colwise" else RowwiseParallel())


def _cut_layer(layer: DoraLayer, cut: Cut) -> None:
    """Leave this rank its part of a layer."""
    layer.cut = cut
    for leaf, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, leaf, _dealt(parameter, leaf, cut))
    if layer.bias is not None:
        layer.bias.value = _dealt(layer.bias.value, "bias", cut)
    base = layer.base
    if not isinstance(base, PackedBase) or cut.along == "whole":
        base.weight = _dealt(base.weight, "weight", cut)
        return
    part = quant.rows_of if cut.along == "column" else quant.columns_of
    count = base.format.shape[0 if cut.along == "column" else 1] // cut.ranks
    stored, state, own = part(
        base.weight, base.state(), base.format, first=cut.mesh.get_local_rank() * count, count=count
    )
    base.hold(_placed(stored.clone(), "weight", cut, trains=False), state, own)


def _dealt(whole: nn.Parameter, leaf: str, cut: Cut) -> nn.Parameter:
    """This rank's part of a tensor that all have alike, in memory of its own."""
    placement: Any = cut.placement(leaf)
    part = whole.detach()
    if not placement.is_replicate():
        width = part.shape[placement.dim] // cut.ranks
        part = part.narrow(placement.dim, cut.mesh.get_local_rank() * width, width)
    return _placed(part.clone(memory_format=torch.contiguous_format), leaf, cut, trains=whole.requires_grad)


def _placed(part: Tensor, leaf: str, cut: Cut, *, trains: bool) -> nn.Parameter:
    placed = DTensor.from_local(part, cut.mesh, [cut.placement(leaf)], run_check=False)
    return nn.Parameter(placed, requires_grad=trains)
