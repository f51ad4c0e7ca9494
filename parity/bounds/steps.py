"""What follows the gradient, on tracked numbers: clipping by its norm, SGD with momentum, AdamW (S5, T2, T3).

Elementwise but for the norm. Errors of one element's gradient in its own moments are taken as independent: in AdamW's
quotient m / sqrt(v) they mostly cancel, and where they add up the standard deviation is at most sqrt(2) times this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.tracked import Tracked

Tensors: TypeAlias = list[Tracked]
"""Every trained tensor of the stack, in a fixed order."""

CLIP_ADDEND = 1e-6
"""S5: what torch adds to the norm."""
BETAS = (0.9, 0.999)
EPS = 1e-8
"""AdamW's defaults in torch."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How parameters move."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.0
    momentum: float = 0.0
    """SGD's."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip: float = 0.0
    """The largest norm of the gradient; 0 leaves it."""


STILL = Rule()
"""No parameter moves: for a gradient alone."""


@dataclass(frozen=True)
class Moved:
    """After a step."""

    parameters: Tensors
    state: dict[str, Tensors] = field(default_factory=dict)
    """By the name that torch gives it."""


def clipped(gradients: Tensors, rule: Rule, unit: float) -> Tensors:
    """T2: `min(1, c / (N + 1e-6)) g`, N being summed in this unit, in any order.

    Raises:
        ValueError: whether the norm is above the limit is not certain.
    """
    if not rule.clip:
        return gradients
    every = Tracked(
        *(np.concatenate([getattr(g, part).ravel() for g in gradients]) for part in ("value", "variance", "guard"))
    )
    norm = tr.sqrt(tr.total(tr.square(every, unit), 0, unit), unit)
    if abs(norm.value - rule.clip) <= max(tr.limit(norm), CLIP_ADDEND):
        raise ValueError(f"a norm of {norm.value} is too near {rule.clip} to be bounded: clip elsewhere")
    if norm.value < rule.clip:
        return gradients
    coefficient = tr.divide(tr.exact(rule.clip), tr.add(norm, tr.exact(CLIP_ADDEND), unit), unit)
    return [tr.multiply(gradient, coefficient, unit) for gradient in gradients]


def stepped(parameters: Tensors, gradients: Tensors, before: dict[str, Tensors], rule: Rule, **at: float) -> Moved:
    """T3: one step; `count` is its number from 1, `unit` the format's."""
    return (_adamw if rule.optimizer == "adamw" else _sgd)(parameters, gradients, before, rule, **at)


def _sgd(parameters: Tensors, gradients: Tensors, before: dict[str, Tensors], rule: Rule, **at: float) -> Moved:
    """Torch's rule. The gradient of a later step is correlated with the parameter; its error is counted whole."""
    unit = at["unit"]

    def buffer(old: Tracked, new: Tracked) -> Tracked:
        return tr.add(tr.scale(old, rule.momentum, unit), new, unit)

    def parameter(old: Tracked, state: Tracked) -> Tracked:
        return tr.subtract(old, tr.scale(state, rule.lr, unit), unit)

    buffers = _each(buffer, before["momentum_buffer"], gradients) if before else gradients
    return Moved(_each(parameter, parameters, buffers), {"momentum_buffer": buffers})


def _adamw(parameters: Tensors, gradients: Tensors, before: dict[str, Tensors], rule: Rule, **at: float) -> Moved:
    """`p = (1 - lr wd) p - lr / (1 - b1^k) m / (sqrt(v) / sqrt(1 - b2^k) + eps)`."""
    unit, count = at["unit"], at["count"]
    (b1, b2), zeros = BETAS, [tr.exact(np.zeros(p.shape)) for p in parameters]
    before = before or {"exp_avg": zeros, "exp_avg_sq": zeros}

    def first(m: Tracked, g: Tracked) -> Tracked:
        apart = tr.add(tr.scale(m, b1, unit), tr.scale(g, 1 - b1, unit), unit)
        return tr.either(apart, tr.add(m, tr.scale(tr.subtract(g, m, unit), 1 - b1, unit), unit))  # torch's lerp

    def second(v: Tracked, g: Tracked) -> Tracked:
        return tr.add(tr.scale(v, b2, unit), tr.scale(tr.square(g, unit), 1 - b2, unit), unit)

    def update(m: Tracked, v: Tracked) -> Tracked:
        root = tr.scale(tr.sqrt(v, unit), 1 / math.sqrt(1 - b2**count), unit)
        quotient = tr.divide(m, tr.add(root, tr.exact(np.full(v.shape, EPS)), unit), unit)
        return tr.scale(quotient, rule.lr / (1 - b1**count), unit)

    def parameter(p: Tracked, moved: Tracked) -> Tracked:
        return tr.subtract(tr.scale(p, 1 - rule.lr * rule.weight_decay, unit), moved, unit)

    firsts, seconds = _each(first, before["exp_avg"], gradients), _each(second, before["exp_avg_sq"], gradients)
    after = _each(parameter, parameters, _each(update, firsts, seconds))
    return Moved(after, {"exp_avg": firsts, "exp_avg_sq": seconds})


def _each(function: Callable[[Tracked, Tracked], Tracked], ones: Sequence[Tracked], others: Tensors) -> Tensors:
    return [function(one, other) for one, other in zip(ones, others, strict=True)]
