"""One forward of a stack and its backward, on one rank's tokens or on a part of them.

Between two layers stands the activation. A ReLU whose input lies within its own limit of zero may flip: what its
gradient touches gets no claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from parity.bounds import tracked as tr
from parity.bounds.dropout import Mask, as_mask
from parity.bounds.layers import Adapter, Layer, Precision, Read, backward, forward
from parity.bounds.repeats import Ids, Repeats, equal, joined, whole
from parity.bounds.tracked import Array, Tracked

Activation: TypeAlias = Literal["identity", "relu"]


@dataclass(frozen=True)
class Tokens:
    """What a step sees of some tokens."""

    x: Array
    """(tokens, in)."""
    G: Array
    """(tokens, out)."""
    masks: tuple[Array | None, ...]
    """D9: for each layer what dropout multiplies by, (tokens, in), or None."""
    alike: tuple[Ids, Ids] | None
    """Which tokens are like each other, in x and in G; None where none is."""

    def __getitem__(self, part: slice) -> Tokens:
        """The same of a part of the tokens."""
        masks = tuple(None if mask is None else mask[part] for mask in self.masks)
        alike = None if self.alike is None else (self.alike[0][part], self.alike[1][part])
        return Tokens(self.x[part], self.G[part], masks, alike)


@dataclass(frozen=True)
class Passed:
    """What a forward and its backward give."""

    gradients: list[Adapter]
    """Of each layer."""
    y: Tracked
    """The stack's output, (tokens, out)."""
    dx: Tracked
    """The stack's input gradient, (tokens, in), without the world size."""


def passed(stack: list[Layer], tokens: Tokens, *, activation: Activation, world: int) -> Passed:
    """Forward through the stack, then backward from `world * G` (S3)."""
    precision = stack[0].precision
    masks = [None if mask is None else as_mask(mask, precision.compute_unit) for mask in tokens.masks]
    reads, outputs = _forwards(stack, masks, tokens.x, activation)
    alike = _alike(tokens, outputs, activation)
    cotangent = tr.scale(tr.exact(tokens.G), world, precision.unit)
    cotangent = tr.cast(cotangent, precision.compute_unit)
    gradients: list[Adapter] = []
    for k in reversed(range(len(stack))):
        if activation == "relu" and k + 1 < len(stack):
            cotangent = relu_backward(cotangent, outputs[k])
        own, cotangent = backward(stack[k], reads[k], cotangent, alike[k])
        gradients.insert(0, own)
    return Passed(gradients, outputs[-1], tr.scale(cotangent, 1 / world, precision.unit))


def loss(y: Tracked, tokens: Tokens, precision: Precision) -> Tracked:
    """`sum(G * y)` of these tokens, a scalar, with the products and the sum at `unit`."""
    repeats = None
    if tokens.alike is not None:
        inputs, cotangents = tokens.alike
        told = (equal(mask) for mask in tokens.masks if mask is not None)
        repeats = Repeats(joined(inputs, *told), cotangents)
    return whole(tr.cast(tr.exact(tokens.G), precision.compute_unit), y, repeats, unit=precision.unit)


def _forwards(
    stack: list[Layer], masks: list[Mask | None], x: Array, activation: Activation
) -> tuple[list[Read], list[Tracked]]:
    """What each layer's backward reads, and each layer's y."""
    here, reads, outputs = tr.cast(tr.exact(x), stack[0].precision.compute_unit), [], []
    for layer, mask in zip(stack, masks, strict=True):
        read, y = forward(layer, here, mask)
        reads.append(read)
        outputs.append(y)
        here = relu(y) if activation == "relu" else y
    return reads, outputs


def _alike(tokens: Tokens, outputs: list[Tracked], activation: Activation) -> list[Repeats | None]:
    """For each layer which tokens repeat: those alike in x and G, less those that a mask or a ReLU tells apart."""
    if tokens.alike is None:
        return [None] * len(outputs)
    inputs, cotangents = tokens.alike
    told = [np.zeros_like(inputs) if mask is None else equal(mask) for mask in tokens.masks]
    repeats: list[Repeats | None] = []
    for k in reversed(range(len(outputs))):
        if activation == "relu" and k + 1 < len(outputs):
            cotangents = joined(cotangents, equal(outputs[k].value > 0))
        repeats.insert(0, Repeats(joined(inputs, *told[: k + 1]), cotangents))
        cotangents = joined(cotangents, told[k])
    return repeats


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
