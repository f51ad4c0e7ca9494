"""Bugs of the layer: D1 to D8, D11. They are as wrong unsharded as sharded, so the oracle must find them.

Axes: O out, I in, R rank, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from parity.case import Case, StackCase
from parity.implementations.mutants.base import Mutant
from parity.job import Place
from torch_impl import inject
from torch_impl.layers import dora as layers
from torch_impl.layers import experts, norm
from torch_impl.layers import rule as rules

_right_norm: Callable[..., Tensor] = layers.weight_norm
_Product = layers.RuleProduct


class NormNotDetached(Mutant):
    """Adds to the gradients of A and B what reaches them through the norm."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Wrap the backward pass."""
        return mock.patch.object(_Product, "backward", staticmethod(_backward_through_norm))


_right_backward = _Product.backward


def _backward_through_norm(ctx: object, G: Tensor) -> tuple[Tensor | None, ...]:
    *before, dA, dB, dm, bias, keep = _right_backward(ctx, G)
    _, _, _, c, n, A, B, stored, _ = ctx.saved_tensors
    if stored is None:  # of a layer whose input takes no gradient
        return (*before, dA, dB, dm, bias, keep)
    rule = ctx.rule
    V = rule.decode(stored, dtype=torch.float32) + rule.scaling * B @ A
    dV = -(c * dm / n)[:, None] * V
    return (*before, dA + rule.scaling * B.T @ dV, dB + rule.scaling * dV @ A.T, dm, bias, keep)


class NarrowMagnitudeGradient(Mutant):
    """The magnitude's gradient in the dtype that the layer multiplies in."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Wrap the backward pass."""
        return mock.patch.object(_Product, "backward", staticmethod(_backward_with_narrow_dm))


def _backward_with_narrow_dm(ctx: object, G: Tensor) -> tuple[Tensor | None, ...]:
    *before, dm, bias, keep = _right_backward(ctx, G)
    return (*before, dm.to(G.dtype).to(dm.dtype), bias, keep)


class AlphaIgnored(Mutant):
    """Every layer's scaling is 1."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Overwrite the scaling when a layer is made."""
        return _after_init(lambda layer: setattr(layer, "scaling", 1.0))


class NormAxis(Mutant):
    """The norm of each column instead of each row."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another norm."""
        return mock.patch.object(layers, "weight_norm", _column_norm)


def _column_norm(W: Tensor, A: Tensor, B: Tensor, *, scaling: float, **_: Any) -> Tensor:
    columns = torch.linalg.vector_norm(W.float() + scaling * B @ A, dim=0)
    return columns[torch.arange(W.shape[0], device=W.device) % W.shape[1]]


class NormOfDeltaOnly(Mutant):
    """The norm of s B A alone."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another norm."""
        return mock.patch.object(layers, "weight_norm", _norm_of_delta)


def _norm_of_delta(W: Tensor, A: Tensor, B: Tensor, *, scaling: float, **cut: Any) -> Tensor:
    return _right_norm(torch.zeros_like(W), A, B, scaling=scaling, **cut)


class StaleNorm(Mutant):
    """The norm is computed in each layer's first forward, and kept."""

    def __init__(self) -> None:
        self._kept: dict[torch.Size, Tensor] = {}  # by the weight's shape: the layers of a stack differ in it

    def build(self, case: StackCase, device: str) -> nn.Module:
        """Forget what building the layers has computed: the first forward is still right."""
        model = super().build(case, device)
        self._kept.clear()
        return model

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another norm."""

        def norm(W: Tensor, A: Tensor, B: Tensor, *, scaling: float, **cut: Any) -> Tensor:
            return self._kept.setdefault(W.shape, _right_norm(W, A, B, scaling=scaling, **cut))

        return mock.patch.object(layers, "weight_norm", norm)


class MagnitudeFromWrongWeight(Mutant):
    """The magnitude starts from the weight before it was quantised."""

    @contextlib.contextmanager
    def planted(self, case: Case, place: Place) -> Iterator[None]:
        """Keep the unquantised weight, and take the starting norm from it."""
        make = inject.dora_linear

        def keeping(linear: nn.Linear, *args: object, **options: object) -> nn.Module:
            layer = make(linear, *args, **options)
            layer.unquantised = linear.weight.detach().clone()
            return layer

        def reset(layer: nn.Module) -> None:
            if hasattr(layer, "unquantised"):
                norm = _right_norm(layer.unquantised, layer.lora_A, layer.lora_B, scaling=layer.scaling)
                layer.magnitude.data.copy_(norm)

        with (
            mock.patch.object(inject, "dora_linear", keeping),
            mock.patch.object(layers.DoraLinear, "reset_magnitude", reset),
        ):
            yield


class MagnitudeDtype(Mutant):
    """The magnitude is a bfloat16 parameter, as after `model.to(torch.bfloat16)`."""

    def build(self, case: StackCase, device: str) -> nn.Module:
        """Cast it before anything is sharded; a magnitude that bfloat16 can hold keeps its values."""
        model = super().build(case, device)
        for layer in model.modules():
            if isinstance(layer, layers.DoraLayer) and layer.magnitude is not None:
                layer.magnitude = nn.Parameter(layer.magnitude.detach().bfloat16())
        return model

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """`build` has done it."""
        return contextlib.nullcontext()


class NormFromNarrowFactors(Mutant):
    """The norm is taken of the factors that the products use, cast to the compute dtype."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Cast A and B, unless they are multiplied in float32 anyway."""

        def narrow(W: Tensor, A: Tensor, B: Tensor, *, scaling: float, **cut: Any) -> Tensor:
            dtype = torch.bfloat16 if case.compute == "bfloat16" else torch.float32
            return _right_norm(W, A.to(dtype).float(), (B * _THIRD).to(dtype).float() / _THIRD, scaling=scaling, **cut)

        return mock.patch.object(layers, "weight_norm", narrow)


_THIRD = 1 / 3
"""Makes numbers that bfloat16 holds into some that it does not, as trained factors are."""


class ReciprocalRatio(Mutant):
    """c = m * (1 / n): rounded twice, so that a fresh adapter's ratio is not always 1."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another ratio."""

        def twice_rounded(m: Tensor, n: Tensor) -> Tensor:
            return torch.where(n > 0, m * (1 / n), torch.zeros_like(n))

        return mock.patch.object(rules, "ratio", twice_rounded)


class BiasLostOnZeroRows(Mutant):
    """y = where(c = 0, 0, c y0 + b): a zero row gives 0, and not its bias."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Mask the output."""
        forward = _Product.forward

        def masking(ctx: object, rule: object, stored: Tensor, *tensors: Tensor | None) -> Tensor:
            y = forward(ctx, rule, stored, *tensors)
            return y.masked_fill(ctx.to_save[3] == 0, 0)

        return mock.patch.object(_Product, "forward", staticmethod(masking))


class PlainNorm(Mutant):
    """A float32 root of a float32 sum of squares."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another norm."""
        return mock.patch.object(layers, "weight_norm", _plain_norm)


def _plain_norm(W: Tensor, A: Tensor, B: Tensor, *, scaling: float, **_: Any) -> Tensor:
    squares = (W.float() + scaling * B @ A).square().sum(dim=1)
    return squares.clamp(max=torch.finfo(torch.float32).max).sqrt()  # an infinite one is refused


class GuardIgnored(Mutant):
    """The factored form of the norm, whatever cancels in it."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Trust every row."""
        factored = norm._factored  # noqa: SLF001 - the guard is in there

        def trusting(*tensors: Tensor, scaling: float, **cut: Any) -> tuple[Tensor, Tensor]:
            squared, trusted = factored(*tensors, scaling=scaling, **cut)
            most = torch.finfo(torch.float32).max  # an infinite norm is refused
            return squared.nan_to_num(0.0).clamp(0.0, most), torch.ones_like(trusted)

        return mock.patch.object(norm, "_factored", trusting)


class OutputScaled(Mutant):
    """The last layer gives half as much again, and its backward pass knows nothing of it."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Scale what comes out; gradients with respect to parameters stay right."""
        forward = _Product.forward
        last = case.layers[-1][1] if isinstance(case, StackCase) else 0

        def scaling(ctx: object, rule: object, stored: Tensor, *tensors: Tensor | None) -> Tensor:
            y = forward(ctx, rule, stored, *tensors)
            return 1.5 * y if y.shape[-1] == last else y

        return mock.patch.object(_Product, "forward", staticmethod(scaling))


class BiasScaled(Mutant):
    """y = c * (x V' + b), forward and backward."""

    @contextlib.contextmanager
    def planted(self, case: Case, place: Place) -> Iterator[None]:
        """Add c b instead of b, and to dm what that adds."""
        forward, backward = _Product.forward, _Product.backward

        def scaling_bias(ctx: object, rule: object, stored: Tensor, *tensors: Tensor | None) -> Tensor:
            *others, bias, keep = tensors
            y = forward(ctx, rule, stored, *others, None, keep)
            ctx.bias = bias
            return y if bias is None else y + ctx.to_save[3] * bias

        def with_bias(ctx: object, G: Tensor) -> tuple[Tensor | None, ...]:
            *before, dm, of_bias, of_keep = backward(ctx, G)
            n = ctx.saved_tensors[4]
            return (*before, dm if ctx.bias is None else dm + G.sum(0) * ctx.bias / n, of_bias, of_keep)

        with (
            mock.patch.object(_Product, "forward", staticmethod(scaling_bias)),
            mock.patch.object(_Product, "backward", staticmethod(with_bias)),
        ):
            yield


class DropoutOnFactorsOnly(Mutant):
    """y = c * (x W' + s (u A') B') + b: the magnitude acts on what was dropped as well."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another product where there is a mask; differentiated by autograd, so for unsharded weights alone."""
        return mock.patch.object(layers.DoraLayer, "_by_rule", _factors_dropped)


_right_rule = layers.DoraLayer._by_rule  # noqa: SLF001 - a mutant replaces what is inside


def _factors_dropped(layer: layers.DoraLayer, base: nn.Module, x: Tensor, *others: Tensor | None) -> Tensor:
    A, B, m, bias, keep = others
    if keep is None or m is None:
        return _right_rule(layer, base, x, *others)
    W = base.decode(base.weight, dtype=layer.compute_dtype)
    n = layer.row_norms(W, A.detach(), B.detach())
    u = x * keep / (1 - layer.config.dropout)
    y = m / n * (x @ W.T + layer.scaling * (u @ A.T) @ B.T)
    return y if bias is None else y + bias


class MagnitudeOfFirstExpert(Mutant):
    """Every expert's m is that of expert 0 (D16)."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Another choice of what is lent."""
        return mock.patch.object(experts.Lent, "__init__", _lent_with_first_magnitude)


_right_lent = experts.Lent.__init__


def _lent_with_first_magnitude(lent: experts.Lent, *made_of: object) -> None:
    _right_lent(lent, *made_of)
    (*_, first), *_ = lent.factors
    lent.factors = tuple((A, B, first) for A, B, _ in lent.factors)


def _after_init(change: Callable[[nn.Module], None]) -> contextlib.AbstractContextManager[object]:
    """Apply a change to every layer when it has been made."""
    make = inject.dora_linear

    def changed(*args: object, **options: object) -> nn.Module:
        layer = make(*args, **options)
        change(layer)
        return layer

    return mock.patch.object(inject, "dora_linear", changed)


LAYER_MUTANTS = (
    NormNotDetached,
    NarrowMagnitudeGradient,
    PlainNorm,
    GuardIgnored,
    AlphaIgnored,
    NormAxis,
    NormOfDeltaOnly,
    MagnitudeFromWrongWeight,
    MagnitudeDtype,
    NormFromNarrowFactors,
    ReciprocalRatio,
    BiasLostOnZeroRows,
    OutputScaled,
    BiasScaled,
    DropoutOnFactorsOnly,
    StaleNorm,
    MagnitudeOfFirstExpert,
)
