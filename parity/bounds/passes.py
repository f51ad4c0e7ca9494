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
from parity.bounds.repeats import Repeats, whole
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
    repeats: Repeats | None
    """Which tokens are like each other; None where none is."""

    def __getitem__(self, part: slice) -> Tokens:
        """The same of a part of the tokens."""
        masks = tuple(None if mask is None else mask[part] for mask in self.masks)
        return Tokens(self.x[part], self.G[part], masks, None if self.repeats is None else self.repeats[part])


@dataclass(frozen=True)
class Met:
    """What meets in one layer's sums over tokens: the values that decide whether tokens are correlated there."""

    u: Array
    """What the adapter reads, (tokens, in)."""
    uncertain: Array
    """The part of u that carries errors of the layers before, (tokens, in): all but their biases; none at first."""
    G: Array
    """The cotangent, (tokens, out)."""


@dataclass(frozen=True)
class Passed:
    """What a forward and its backward give."""

    gradients: list[Adapter]
    """Of each layer."""
    y: Tracked
    """The stack's output, (tokens, out)."""
    dx: Tracked
    """The stack's input gradient, (tokens, in), without the world size."""
    met: list[Met]
    """Of each layer."""


def passed(stack: list[Layer], tokens: Tokens, *, activation: Activation, world: int) -> Passed:
    """Forward through the stack, then backward from `world * G` (S3)."""
    precision = stack[0].precision
    masks = [None if mask is None else as_mask(mask, precision.compute_unit) for mask in tokens.masks]
    reads, outputs = _forwards(stack, masks, tokens.x, activation)
    cotangent = tr.scale(tr.exact(tokens.G), world, precision.unit)
    cotangent = tr.cast(cotangent, precision.compute_unit)
    gradients: list[Adapter] = []
    met: list[Met] = []
    for k in reversed(range(len(stack))):
        if activation == "relu" and k + 1 < len(stack):
            cotangent = relu_backward(cotangent, outputs[k])
        met.insert(0, Met(reads[k].u.value, _uncertain(stack, reads, k), cotangent.value))
        own, cotangent = backward(stack[k], reads[k], cotangent, tokens.repeats)
        gradients.insert(0, own)
    return Passed(gradients, outputs[-1], tr.scale(cotangent, 1 / world, precision.unit), met)


def loss(y: Tracked, tokens: Tokens, precision: Precision) -> Tracked:
    """`sum(G * y)` of these tokens, a scalar, with the products and the sum at `unit`."""
    return whole(tr.cast(tr.exact(tokens.G), precision.compute_unit), y, tokens.repeats, unit=precision.unit)


def _uncertain(stack: list[Layer], reads: list[Read], k: int) -> Array:
    """What layer k reads of the layer before, without its bias."""
    u, bias = reads[k].u.value, stack[k - 1].bias
    if k == 0:
        return np.zeros_like(u)
    return u if bias is None else np.where(u == 0, 0.0, u - bias.value)


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
