"""A stack of DoRA layers over ranks and steps: the bound of every gradient, momentum and parameter.

The loss is `sum(G * y)`. Rank k backpropagates `world * sum(G_k * y_k)` over its own tokens, and the gradient is the
mean over ranks (S3); then comes what `steps` says (T2, T3).
Each step sees the same x and G, so the second one starts from parameters that carry the error of the first.

The model's reach: within a step errors of A, B and c are added up coherently; from step to step the errors of the
parameters' elements are taken as independent. That held over two steps on Gaussian data even where an update is larger
than the parameter (6.8 standard deviations at most, of 16). Where updates are that large, over many steps or on data of
one sign, the errors feed on each other, and only the guard is to be relied on.

Between two layers stands the activation. A ReLU whose input lies within its own limit of zero may flip: what its
gradient touches gets no claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.layers import FLOAT32, Adapter, Layer, Precision, backward, forward, prepare
from parity.bounds.steps import STILL, Rule, clipped, stepped
from parity.bounds.tracked import Array, Tracked

if TYPE_CHECKING:
    from collections.abc import Sequence

Activation: TypeAlias = Literal["identity", "relu"]
Bounds: TypeAlias = dict[tuple[str, str], Tracked]
"""The tracked tensor of each (name, kind): ("layers.0.lora_A", "gradient")."""

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
    magnitude: Array
    """(out,)."""
    bias: Array | None = None
    """(out,), or none."""


@dataclass(frozen=True)
class Setting:
    """What `propagate` holds fixed over the steps."""

    scaling: float
    activation: Activation
    precision: Precision
    tokens: tuple[int, ...]
    d9: bool


def propagate(
    layers: Sequence[LayerInputs],
    x: Array,
    G: Array | Sequence[Array],
    *,
    scaling: float,
    activation: Activation = "identity",
    precision: Precision = FLOAT32,
    rule: Rule = STILL,
    steps: int = 1,
    world: int = 1,
    tokens: Sequence[int] | None = None,
    d9: bool = False,
) -> list[Bounds]:
    """S3, T2, T3: for each step the bound of every ("layers.K.NAME", KIND).

    KIND is "gradient" (clipped), "parameter" (after the step) or "optimizer:NAME". Besides these, each step holds
    ("x", "gradient") and ("y", "output"), the stack's own, of all ranks together.

    Args:
        layers: the stack, "layers.0" first.
        x: (tokens, in) of all ranks, rank 0's tokens first.
        G: (tokens, out), or one such array a step.
        scaling: s (D1).
        activation: between two layers, not after the last.
        precision: the formats of the computation that is bounded.
        rule: how the parameters move.
        steps: how many optimizer steps to follow.
        world: the number of ranks.
        tokens: each rank's token count; even shares, the first ranks one more, by default.
        d9: also allow PEFT's form of the output (the outside witness of link 1).

    Raises:
        ValueError: where the token counts do not add up to x's.
    """
    counts = tuple(tokens) if tokens is not None else _shares(x.shape[0], world)
    if len(counts) != world or sum(counts) != x.shape[0]:
        raise ValueError(f"tokens {counts} do not deal {x.shape[0]} tokens to {world} ranks: give one count a rank")
    setting = Setting(scaling, activation, precision, counts, d9)
    parameters = [tr.exact(getattr(layer, name)) for layer in layers for name in TENSORS]
    state: dict[str, list[Tracked]] = {}
    history: list[Bounds] = []
    for step in range(steps):
        cotangent = G if isinstance(G, np.ndarray) else G[step]
        gradients, outside = _step_gradients(layers, _adapters(parameters), (x, cotangent), setting)
        gradients = clipped(gradients, rule, precision.unit)
        moved = stepped(parameters, gradients, state, rule, count=step + 1, unit=precision.unit)
        parameters, state = moved.parameters, moved.state
        history.append(outside | _named(gradients, "gradient") | _named(parameters, "parameter"))
        for name, tensors in state.items():
            history[-1] |= _named(tensors, f"optimizer:{name}")
    return history


def _step_gradients(
    layers: Sequence[LayerInputs], adapters: list[Adapter], data: tuple[Array, Array], setting: Setting
) -> tuple[list[Tracked], Bounds]:
    """S3: the mean over ranks of each rank's gradients, and the stack's own output and input gradient."""
    stack = [_prepared(layer, adapter, setting) for layer, adapter in zip(layers, adapters, strict=True)]
    edges = np.cumsum((0, *setting.tokens))
    ranks = []
    for start, stop in pairwise(edges):
        ranks.append(_rank_gradients(stack, data[0][start:stop], data[1][start:stop], setting))
    unit = setting.precision.unit
    reduced = [
        tr.mean([getattr(rank[0][k], name) for rank in ranks], unit) for k in range(len(layers)) for name in TENSORS
    ]
    outside = {("y", "output"): _stacked([r[1] for r in ranks]), ("x", "gradient"): _stacked([r[2] for r in ranks])}
    return reduced, outside


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


def _rank_gradients(stack: list[Layer], x: Array, G: Array, setting: Setting) -> tuple[list[Adapter], Tracked, Tracked]:
    """One rank: forward through the stack, then backward; `(gradients, y, dx)`."""
    unit, compute = setting.precision.unit, setting.precision.compute_unit
    inputs, y0s, masks = [tr.cast(tr.exact(x), compute)], [], []
    y = inputs[0]
    for layer in stack:
        y0, y = forward(layer, inputs[-1])
        y0s.append(y0)
        masks.append(y)
        inputs.append(relu(y) if setting.activation == "relu" else y)
    cotangent = tr.cast(tr.scale(tr.exact(G), len(setting.tokens), unit), compute)
    gradients: list[Adapter] = []
    for k in reversed(range(len(stack))):
        if setting.activation == "relu" and k + 1 < len(stack):
            cotangent = relu_backward(cotangent, masks[k])
        own, cotangent = backward(stack[k], inputs[k], y0s[k], cotangent)
        gradients.insert(0, own)
    return gradients, y, tr.scale(cotangent, 1 / len(setting.tokens), unit)


def relu(y: Tracked) -> Tracked:
    """`max(y, 0)`: never further off than y is, and exactly 0 where y is certainly negative."""
    off = y.value < -tr.limit(y)
    return Tracked(np.maximum(y.value, 0.0), np.where(off, 0.0, y.variance), np.where(y.value < -y.guard, 0.0, y.guard))


def relu_backward(G: Tracked, y: Tracked) -> Tracked:
    """G where `y > 0`, else 0; no claim where y's sign is not certain and G is not an exact zero."""
    on, unsure = y.value > 0, (np.abs(y.value) <= tr.limit(y)) & (tr.limit(y) > 0)
    unsure &= (G.value != 0) | (G.guard > 0)
    variance = np.where(unsure, np.inf, np.where(on, G.variance, 0.0))
    return Tracked(np.where(on, G.value, 0.0), variance, np.where(unsure, np.inf, np.where(on, G.guard, 0.0)))


def _adapters(tensors: list[Tracked]) -> list[Adapter]:
    """Each layer's three."""
    return [Adapter(*tensors[at : at + len(TENSORS)]) for at in range(0, len(tensors), len(TENSORS))]


def _named(tensors: list[Tracked], kind: str) -> Bounds:
    return {(f"layers.{k // len(TENSORS)}.{TENSORS[k % len(TENSORS)]}", kind): t for k, t in enumerate(tensors)}


def _stacked(parts: list[Tracked]) -> Tracked:
    return Tracked(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("value", "variance", "guard")))


def _shares(tokens: int, world: int) -> tuple[int, ...]:
    return tuple(tokens // world + (rank < tokens % world) for rank in range(world))
