"""A stack of DoRA layers over ranks and steps: the bound of every gradient, momentum and parameter.

The loss is `sum(G * y)`. Rank k backpropagates `world * sum(G_k * y_k)` over its own tokens, in one forward or in
several whose gradients are added (T1), and the gradient is the mean over ranks (S3); then comes what `steps` says (T2,
T3). Each step sees the same x, so the second one starts from parameters that carry the error of the first.

The domain of the bounds (docs/tolerances.md, 3):

- Within a step errors of A, B and c are added up coherently, and so are those of tokens that repeat (`repeats`), up to
  the guard itself. In a stack of several layers, tokens that are correlated without repeating are refused.
- The features of one token, and the rows and columns of W, A and B, are ordinary numbers: none is the copy of another.
- From step to step the errors of the parameters' elements are taken as independent. That held over two steps on
  Gaussian data even where an update is larger than the parameter (6.8 standard deviations at most, of 16). Where
  updates are that large, over many steps or on data of one sign, the errors feed on each other, and only the guard is
  to be relied on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.layers import FLOAT32, Adapter, Layer, Precision, prepare
from parity.bounds.passes import Activation, Passed, Tokens, loss, passed
from parity.bounds.repeats import Ids, Repeats, alike, closeness, require_independent
from parity.bounds.steps import STILL, Rule, clipped, stepped
from parity.bounds.tracked import Array, Tracked

if TYPE_CHECKING:
    from collections.abc import Sequence

Bounds: TypeAlias = dict[tuple[str, str], Tracked]
"""The tracked tensor of each (name, kind): ("layers.0.lora_A", "gradient")."""
Share: TypeAlias = "int | Sequence[int]"
"""A rank's token count, or the count of each of its forwards."""

TENSORS = ("lora_A", "lora_B", "magnitude")


@dataclass(frozen=True)
class LayerInputs:
    """The numbers that both sides hold exactly, as float64."""

    weight: Array
    """W as the forward multiplies by it (dequantised and cast), (out, in)."""
    lora_A: Array  # noqa: N815 (PEFT's name)
    """(rank, in)."""
    lora_B: Array  # noqa: N815 (PEFT's name)
    """(out, rank)."""
    magnitude: Array | None
    """(out,); None in LoRA, where c is exactly 1 and no magnitude is among the results."""
    bias: Array | None = None
    """(out,), or none."""


@dataclass(frozen=True)
class Setting:
    """What `propagate` holds fixed over the steps."""

    scaling: float
    activation: Activation
    precision: Precision
    tokens: tuple[tuple[int, ...], ...]
    """Of each rank, the token count of each of its forwards."""
    d9: bool


def propagate(
    layers: Sequence[LayerInputs],
    x: Array,
    G: Array | Sequence[Array],
    *,
    scaling: float,
    masks: Sequence[Array | None] | None = None,
    activation: Activation = "identity",
    precision: Precision = FLOAT32,
    rule: Rule = STILL,
    steps: int = 1,
    world: int = 1,
    tokens: Sequence[Share] | None = None,
    d9: bool = False,
) -> list[Bounds]:
    """S3, T1, T2, T3, D9: for each step the bound of every ("layers.K.NAME", KIND).

    KIND is "gradient" (clipped), "parameter" (after the step) or "optimizer:NAME". Besides these, each step holds of
    its forward and backward, unclipped: ("layers.K", "norm") and ("layers.K", "ratio"), (out,), but in LoRA;
    ("y", "output") and ("x", "gradient"), the stack's own, of all ranks' tokens in order; and ("loss", "loss"),
    (world,), the `sum(G_k * y_k)` of each rank, without the world size.

    Args:
        layers: the stack, "layers.0" first.
        x: (tokens, in) of all ranks, rank 0's tokens first.
        G: (tokens, out), or one such array a step.
        scaling: s (D1).
        masks: for each layer what dropout multiplies its input by, (tokens, in) of all ranks: 0 or 1 / (1 - p), not
            rounded; None for a layer that drops nothing. The same at every step.
        activation: between two layers, not after the last.
        precision: the formats of the computation that is bounded.
        rule: how the parameters move.
        steps: how many optimizer steps to follow.
        world: the number of ranks.
        tokens: each rank's token count, or the counts of its forwards where it makes a step of several; by default one
            forward a rank and even shares, the first ranks one more.
        d9: also allow PEFT's form of the output (the outside witness of link 1).

    Raises:
        ValueError: where the token counts do not add up to x's, or the masks are not one a layer.
        InputsNotIndependent: where tokens are correlated without repeating.
    """
    counts = _counts(tokens if tokens is not None else _shares(x.shape[0], world))
    if len(counts) != world or sum(map(sum, counts)) != x.shape[0]:
        raise ValueError(f"tokens {counts} do not deal {x.shape[0]} tokens to {world} ranks: give one count a rank")
    if masks is not None and len(masks) != len(layers):
        raise ValueError(f"{len(masks)} masks for {len(layers)} layers: give one a layer, None where nothing drops")
    setting = Setting(scaling, activation, precision, counts, d9)
    named = [(k, name) for k, layer in enumerate(layers) for name in TENSORS if getattr(layer, name) is not None]
    parameters = [tr.exact(getattr(layers[k], name)) for k, name in named]
    state: dict[str, list[Tracked]] = {}
    history: list[Bounds] = []
    every = [G] if isinstance(G, np.ndarray) else G
    batches = [_seen(x, cotangent, tuple(masks or [None] * len(layers)), precision) for cotangent in every]
    for step in range(steps):
        seen = batches[step if len(batches) > 1 else 0]
        adapters = _adapters(dict(zip(named, parameters, strict=True)), len(layers))
        reduced, outside = _step_gradients(layers, adapters, seen, setting)
        gradients = clipped([reduced[at] for at in named], rule, precision.unit)
        moved = stepped(parameters, gradients, state, rule, count=step + 1, unit=precision.unit)
        parameters, state = moved.parameters, moved.state
        kinds = {"gradient": gradients, "parameter": parameters} | {f"optimizer:{n}": t for n, t in state.items()}
        history.append(outside | _named(named, kinds))
    return history


def _seen(x: Array, G: Array, masks: tuple[Array | None, ...], precision: Precision) -> Tokens:
    """All tokens, and which of them repeat."""
    share = closeness(len(x), unit=precision.unit, compute_unit=precision.compute_unit)
    repeats = Repeats(alike(x, share), alike(G, share))
    repeated = any(len(np.unique(side)) < len(x) for side in (repeats.inputs, repeats.cotangents))
    return Tokens(x, G, masks, repeats if repeated else None)


def _step_gradients(
    layers: Sequence[LayerInputs], adapters: list[Adapter], seen: Tokens, setting: Setting
) -> tuple[dict[tuple[int, str], Tracked], Bounds]:
    """S3: the mean over ranks of each rank's gradients, by layer and name, and what else the stack gives."""
    stack = [_prepared(layer, adapter, setting) for layer, adapter in zip(layers, adapters, strict=True)]
    parts = _slices([count for rank in setting.tokens for count in rank])
    world, unit = len(setting.tokens), setting.precision.unit
    every = [passed(stack, seen[part], activation=setting.activation, world=world) for part in parts]
    _require_independent_layers(every, seen.repeats)
    coherent = seen.repeats is not None and any(
        _spans(ids, parts) for ids in (seen.repeats.inputs, seen.repeats.cotangents)
    )
    reduced = {
        (k, name): tr.mean([getattr(p.gradients[k], name) for p in every], unit, world=world, coherent=coherent)
        for k, adapter in enumerate(adapters)
        for name in TENSORS
        if getattr(adapter, name) is not None
    }
    return reduced, _outside(stack, every, seen, setting)


def _require_independent_layers(every: list[Passed], repeats: Repeats | None) -> None:
    """Refuse tokens whose errors add up in a layer because they come from another layer's A, B or c.

    Those before the layer are in what it reads, and meet G; those behind it are in G, and meet what it reads.

    Raises:
        InputsNotIndependent: as `require_independent`.
    """
    layers = len(every[0].met)
    for k in range(layers):
        u, uncertain, G = (np.concatenate([getattr(p.met[k], name) for p in every]) for name in ("u", "uncertain", "G"))
        inputs, cotangents = (None, None) if repeats is None else (repeats.inputs, repeats.cotangents)
        if k > 0:
            require_independent(uncertain, G, ids=inputs, place=f"layers.{k}")
        if k + 1 < layers:
            require_independent(u, G, ids=cotangents, place=f"layers.{k}")


def _outside(stack: list[Layer], every: list[Passed], seen: Tokens, setting: Setting) -> Bounds:
    """The tensors that are no parameter's."""
    y = tr.joined([p.y for p in every])
    ranks = _slices([sum(rank) for rank in setting.tokens])
    losses = [loss(y[rank], seen[rank], setting.precision) for rank in ranks]
    found: Bounds = {("y", "output"): y, ("x", "gradient"): tr.joined([p.dx for p in every])}
    found["loss", "loss"] = tr.joined([tr.reshaped(one, (1,)) for one in losses])
    for k, layer in enumerate(stack):
        if layer.norm is not None:
            found |= {(f"layers.{k}", "norm"): layer.norm, (f"layers.{k}", "ratio"): layer.ratio}
    return found


def _prepared(layer: LayerInputs, adapter: Adapter, setting: Setting) -> Layer:
    bias = None if layer.bias is None else tr.exact(layer.bias)
    return prepare(
        tr.exact(layer.weight),
        adapter,
        scaling=setting.scaling,
        precision=setting.precision,
        bias=bias,
        d9=setting.d9,
    )


def _adapters(tensors: dict[tuple[int, str], Tracked], layers: int) -> list[Adapter]:
    """Each layer's three, or two."""
    return [Adapter(tensors[k, "lora_A"], tensors[k, "lora_B"], tensors.get((k, "magnitude"))) for k in range(layers)]


def _named(names: list[tuple[int, str]], kinds: dict[str, list[Tracked]]) -> Bounds:
    return {
        (f"layers.{k}.{name}", kind): tensor
        for kind, tensors in kinds.items()
        for (k, name), tensor in zip(names, tensors, strict=True)
    }


def _counts(tokens: Sequence[Share]) -> tuple[tuple[int, ...], ...]:
    return tuple((share,) if isinstance(share, int) else tuple(share) for share in tokens)


def _shares(tokens: int, world: int) -> tuple[int, ...]:
    return tuple(tokens // world + (rank < tokens % world) for rank in range(world))


def _slices(counts: Sequence[int]) -> list[slice]:
    """Where each run of so many tokens lies."""
    return [slice(start, stop) for start, stop in pairwise((0, *accumulate(counts)))]


def _spans(ids: Ids, parts: list[slice]) -> bool:
    """Whether tokens that are alike lie in different parts."""
    return sum(len(np.unique(ids[part])) for part in parts) > len(np.unique(ids))
