"""One rule for every kind of layer, dropout included: the products of D9 and D3, and their closed-form gradients (G1).

Axes: T tokens or places, O output features, I input features, R adapter rank; x, h, y have the axes of the layer's own
operation.
Clauses: D3, D5 to D9, D11, D12, G1, S8, S10.

A layer is two operations, `down` by the rows of W or of A, and `up` by those of B, each linear in either argument. With
u = mask * x, h = down(u, A), y0 = down(u, W) + s up(h, B) and c = m / n, n held constant:

    forward    y = c * y0 + b,        with dropout y = down(x, W) + (c - 1) * down(u, W) + c * s up(h, B) + b
    backward   H = G * c,  dm = sum(G * y0) / n,  dB = s up'_B(H, h),  dA = s down'_A(up'_h(H, B), u)
               dx = down'_x(H, W) + s down'_x(up'_h(H, B), A),
               with dropout dx = down'_x(G, W) + mask * (down'_x((c - 1) * G, W) + s down'_x(up'_h(H, B), A))

where f'_z is the transpose of f in z. With `method="lora"` c is 1 and there is no m.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from torch_impl.layers.cut import Cut
from torch_impl.layers.norm import ratio
from torch_impl.layers.products import product


class Operation(ABC):
    """y = f(x, rows), linear in both, and its two transposes."""

    feature_axis: int
    """The axis of y along which the output features lie."""

    @abstractmethod
    def plain(self, x: Tensor, rows: Tensor) -> Tensor:
        """Every row times what it reads of x, as torch's own layer has it: D12 holds y to its bits."""

    @abstractmethod
    def input_gradient(self, G: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of x, which has this shape."""

    @abstractmethod
    def rows_gradient(self, G: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the rows, which have this shape."""

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Every row times what it reads of x, in whatever order of sums is fast."""
        return self.plain(x, rows)

    def add(self, y: Tensor, x: Tensor, rows: Tensor, scale: float) -> Tensor:
        """Add scale * f(x, rows) to y, in place."""
        return y.add_(self(x, rows), alpha=scale)

    def add_input_gradient(self, dx: Tensor, G: Tensor, rows: Tensor, scale: float) -> Tensor:
        """Add scale times the gradient of x to dx, in place."""
        return dx.add_(self.input_gradient(G, rows, dx.shape), alpha=scale)


class Matrix(Operation):
    """A linear layer's operation: y = x rows'; x and y have any leading axes."""

    feature_axis = -1

    def plain(self, x: Float[Tensor, "*T I"], rows: Float[Tensor, "O I"]) -> Float[Tensor, "*T O"]:
        """As nn.Linear."""
        return functional.linear(x, rows)

    def __call__(self, x: Float[Tensor, "*T I"], rows: Float[Tensor, "O I"]) -> Float[Tensor, "*T O"]:
        """By the faster kernel."""
        return product(x, rows)

    def add(self, y: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], rows: Tensor, scale: float) -> Tensor:
        """In one pass over y."""
        y.view(-1, y.shape[-1]).addmm_(_flat(x), rows.T, alpha=scale)
        return y

    def input_gradient(self, G: Float[Tensor, "*T O"], rows: Float[Tensor, "O I"], shape: torch.Size) -> Tensor:
        """G rows."""
        return product(_flat(G), rows.T).reshape(shape)

    def add_input_gradient(self, dx: Float[Tensor, "*T I"], G: Tensor, rows: Tensor, scale: float) -> Tensor:
        """In one pass over dx."""
        dx.view(-1, dx.shape[-1]).addmm_(_flat(G), rows, alpha=scale)
        return dx

    def rows_gradient(self, G: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], shape: torch.Size) -> Tensor:
        """G' x, the narrower of the two on the left, where the kernels take less time."""
        G_TO, x_TI = _flat(G), _flat(x)
        narrow_x = x_TI.shape[1] < G_TO.shape[1]
        return (product(x_TI.T, G_TO.T).T if narrow_x else G_TO.T @ x_TI).reshape(shape)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Rule:
    """What a product needs besides its tensors."""

    down: Operation
    """By the rows of W and of A."""
    up: Operation
    """By the rows of B."""
    scaling: float
    """s of D1."""
    compute_dtype: torch.dtype
    """What x, W, A and B are multiplied in (D11: n, m and c stay float32)."""
    decode: Callable[..., Tensor]
    """(stored weight, dtype=) -> W in rows, (O, row)."""
    norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(W, A, B) -> n (O), float32."""
    kept_scale: float = 1.0
    """What dropout's mask holds where it keeps: 1 / (1 - p)."""
    cut: Cut | None = None
    """S10: how the layer lies on tensor ranks, whose sums make it whole."""

    def drop(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Mask * x; x itself without dropout."""
        return x if keep is None else (x * keep).mul_(self.kept_scale)

    def over_inputs(self, *parts: Tensor) -> Sequence[Tensor]:
        """S10: what sums over a row's numbers gave, where other ranks have the rest of each row: their sums."""
        return self.cut.sums(*parts) if self.cut is not None and self.cut.splits_rows else parts

    def over_outputs(self, *parts: Tensor, of: Tensor) -> Sequence[Tensor]:
        """S10: what sums over output features gave, where other ranks have the rest of these: their sums.

        It was made of an input that is the same on all of these ranks, which is checked once.
        """
        if self.cut is None or self.cut.along != "column":
            return parts
        return self.cut.sums(*parts, alike=of if self.cut.is_first_time() else None)

    def along(self, v_O: Tensor, like: Tensor) -> Tensor:
        """A number for each output feature, so shaped that it multiplies y."""
        shape = [1] * like.dim()
        shape[self.down.feature_axis] = -1
        return v_O.view(shape)

    def over_places(self, y: Tensor) -> Tensor:
        """Sum over every axis but that of the output features: (O)."""
        return y.movedim(self.down.feature_axis, -1).flatten(0, -2).sum(dim=0)


class RuleProduct(torch.autograd.Function):
    """The rule with n held constant (D5).

    It keeps u, h and y0 in the compute dtype, c, n, the mask as booleans, and references to A, B and the stored weight,
    which it decodes once in each direction.
    """

    @staticmethod
    def forward(ctx: Any, rule: Rule, stored: Tensor, *tensors: Tensor | None) -> Tensor:
        """Tensors are x, A, B, m (O) or None, b (O) or None, and which of x is kept (bool, x's shape) or None.

        y has x's dtype, or the stored weight's where x holds integers.
        """
        x, A, B, m_O, bias_O, keep = tensors
        out_dtype = x.dtype if x.is_floating_point() else stored.dtype
        y0 = n_O = c_O = None
        with torch.autocast(x.device.type, enabled=False):
            dtype, scaling = rule.compute_dtype, rule.scaling
            x_used = x.to(dtype) if x.is_floating_point() else x
            u, W = rule.drop(x_used, keep), rule.decode(stored, dtype=dtype)
            h, B_used = rule.down(u, A.to(dtype)), B.to(dtype)
            y = rule.down.plain(x_used, W)
            if m_O is None:
                y, h = rule.over_inputs(y, h)
                y = rule.up.add(y, h, B_used, scaling).float()
            else:
                n_O = rule.norm(W, A, B)
                c_O = ratio(m_O, n_O)
                c = rule.along(c_O, y)
                if keep is None:
                    y, h = rule.over_inputs(y, h)
                    y0 = rule.up.add(y, h, B_used, scaling)
                    y = y0.float() * c
                else:
                    y, h, kept = rule.over_inputs(y, h, rule.down.plain(u, W))
                    delta = scaling * rule.up(h, B_used)
                    y0 = kept + delta
                    y = y.float() + (c - 1) * kept.float() + c * delta.float()
            if bias_O is not None:
                y += rule.along(bias_O, y)
        ctx.save_for_backward(u, h, y0, c_O, n_O, A, B, stored if ctx.needs_input_grad[2] else None, keep)
        ctx.rule, ctx.x_shape, ctx.x_dtype = rule, x.shape, x.dtype
        return y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """G1, D9: dx in x's dtype; dA, dB, dm in float32."""
        u, h, y0, c_O, n_O, A, B, stored, keep = ctx.saved_tensors
        rule: Rule = ctx.rule
        dtype, scaling = rule.compute_dtype, rule.scaling
        with torch.autocast(G.device.type, enabled=False):
            G32 = G.float()
            dm_O = None if n_O is None else ratio(rule.over_places(G32 * y0.float()), n_O)
            H = (G32 if c_O is None else G32 * rule.along(c_O, G32)).to(dtype)
            HB = rule.up.input_gradient(H, B.to(dtype), h.shape)
            dB = scaling * rule.up.rows_gradient(H, h, B.shape).float()
            dA = scaling * rule.down.rows_gradient(HB, u, A.shape).float()
            dx = None
            if ctx.needs_input_grad[2]:
                W = rule.decode(stored, dtype=dtype)
                if keep is None:
                    dx = rule.down.input_gradient(H, W, ctx.x_shape)
                elif c_O is None:  # c - 1 is 0
                    dx = torch.zeros(ctx.x_shape, dtype=dtype, device=G.device)
                else:
                    dx = rule.down.input_gradient((G32 * rule.along(c_O - 1, G32)).to(dtype), W, ctx.x_shape)
                dx = rule.down.add_input_gradient(dx, HB, A.to(dtype), scaling)
                if keep is not None:
                    dx = rule.drop(dx, keep).add_(rule.down.input_gradient(G.to(dtype), W, ctx.x_shape))
                dA, dx = rule.over_outputs(dA, dx, of=u)
                dx = dx.to(ctx.x_dtype)
            else:
                (dA,) = rule.over_outputs(dA, of=u)
        return None, None, dx, dA, dB, dm_O, None, None


def draw(x: Tensor, *, rate: float) -> Tensor:
    """D9: which numbers of x dropout keeps (bool, x's shape): those that `nn.Dropout(rate)` would, at the same seed."""
    return functional.dropout(torch.ones_like(x), rate, training=True) != 0
