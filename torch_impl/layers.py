"""The DoRA layer: a linear over a frozen base, dense or packed, with its closed-form gradients.

Axes: T tokens, O output features, I input features, R adapter rank.
Clauses: D2, D3, D5 to D9, D11, D12, G, S7, S8.

With ``c = m / n`` and ``y0 = x W' + s (x A') B'`` the layer is ``y = c * y0 + b``. Under FSDP a rank holds
``ceil(R / world)`` rows of A and ``ceil(O / world)`` of B, m and W (fsdp2), or one contiguous range of A, B, m
flattened, and another of W (fsdp1):

    forward   all-gather A, B, m (float32)  ->  all-gather W (or its bytes)  ->  y = c * (x W' + s h B') + b,  h = x A'
    dgrad     all-gather both again         ->  H = G * c,  dx = H W + s (H B) A
    wgrad     no further gather             ->  dm = sum_t(G * y0) / n,  dB = s H' h,  dA = s (H B)' x
              reduce-scatter (mean) of dA, dB, dm in float32

S8: all of it runs inside the forward of the base, the one place where the base's weight is whole; the adapter's tensors
are handed to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torch_impl.bases import DenseBase, FrozenBias, PackedBase
from torch_impl.config import DoraConfig
from torch_impl.errors import MagnitudeRangeError, ShardingError
from torch_impl.kinds import Rows
from torch_impl.norm import grouped_weight_norm, ratio, weight_norm
from torch_impl.products import product
from torch_impl.rule import Matrix, Operation, Rule, RuleProduct, draw
from torch_impl.shards import is_sharded


@dataclass(frozen=True)
class Arithmetic:
    """What one product needs besides its tensors."""

    scaling: float
    """s of D1."""
    compute_dtype: torch.dtype
    """What x, W, A and B are multiplied in (D11: n, m and c stay float32)."""
    decode: Callable[..., Tensor]
    """(stored weight, dtype=) -> W (O, I)."""


class DoraProduct(torch.autograd.Function):
    """y = c * (x W' + s (x A') B') + b with n held constant (D5); the backward pass is the closed form (G).

    It keeps x and y0 (in the compute dtype), h = x A', c, n, and references to A, B and the stored weight. It decodes
    that weight once in each direction; the only temporary of W's size is the decoded weight.
    """

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, stored: Tensor, *tensors: Tensor | None) -> Tensor:
        """Tensors are x (..., I), A (R, I), B (O, R), m (O), b (O) or None; y is (..., O) in x's dtype."""
        x, A_RI, B_OR, m_O, bias_O = tensors
        with torch.autocast(x.device.type, enabled=False):
            dtype = arithmetic.compute_dtype
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            W_OI = arithmetic.decode(stored, dtype=dtype)
            n_O = weight_norm(W_OI, A_RI, B_OR, scaling=arithmetic.scaling)
            c_O = ratio(m_O, n_O)
            h_TR = product(x_TI, A_RI.to(dtype))
            # by torch's own kernel, as the plain layer has it: a fresh adapter gives its output to the bit (D12)
            y0_TO = (x_TI @ W_OI.T).addmm_(h_TR, B_OR.to(dtype).T, alpha=arithmetic.scaling)
            # shaped before it is computed: FSDP2 warns of an output that is a view
            y = y0_TO.reshape(*x.shape[:-1], y0_TO.shape[-1]).float() * c_O
            if bias_O is not None:
                y += bias_O
        ctx.save_for_backward(x_TI, h_TR, y0_TO, c_O, n_O, A_RI, B_OR, stored)
        ctx.arithmetic, ctx.x_shape, ctx.x_dtype = arithmetic, x.shape, x.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """G: dx in x's dtype; dA, dB, dm in float32."""
        x_TI, h_TR, y0_TO, c_O, n_O, A_RI, B_OR, stored = ctx.saved_tensors
        dtype, scaling = ctx.arithmetic.compute_dtype, ctx.arithmetic.scaling
        with torch.autocast(G.device.type, enabled=False):
            G_TO = G.reshape(-1, G.shape[-1]).float()
            H_TO = (G_TO * c_O).to(dtype)
            HB_TR = product(H_TO, B_OR.to(dtype).T)
            dm_O = ratio((G_TO * y0_TO.float()).sum(dim=0), n_O)
            dB_OR = scaling * product(h_TR.T, H_TO.T).T.float()
            dA_RI = scaling * (HB_TR.T @ x_TI).float()
            dx = None
            if ctx.needs_input_grad[2]:
                dx_TI = product(H_TO, ctx.arithmetic.decode(stored, dtype=dtype).T)
                dx_TI.addmm_(HB_TR, A_RI.to(dtype), alpha=scaling)
                dx = dx_TI.to(ctx.x_dtype).reshape(ctx.x_shape)
        return None, None, dx, dA_RI, dB_OR, dm_O, None


class LoraProduct(torch.autograd.Function):
    """y = x W' + s (x A') B' + b: `DoraProduct` with c = 1 and no magnitude, for `method="lora"`."""

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, stored: Tensor, *tensors: Tensor | None) -> Tensor:
        """Tensors are those of `DoraProduct`, the magnitude being None; y is (..., O) in x's dtype."""
        x, A_RI, B_OR, _, bias_O = tensors
        with torch.autocast(x.device.type, enabled=False):
            dtype = arithmetic.compute_dtype
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            h_TR = product(x_TI, A_RI.to(dtype))
            W_OI = arithmetic.decode(stored, dtype=dtype)
            # shaped before it is computed: FSDP2 warns of an output that is a view
            y = x_TI.new_empty(*x.shape[:-1], W_OI.shape[0])
            y_TO = torch.mm(x_TI, W_OI.T, out=y.view(-1, W_OI.shape[0]))
            y_TO.addmm_(h_TR, B_OR.to(dtype).T, alpha=arithmetic.scaling)
            if bias_O is not None:
                y = y.float() + bias_O
        ctx.save_for_backward(x_TI, h_TR, A_RI, B_OR, stored)
        ctx.arithmetic, ctx.x_shape, ctx.x_dtype = arithmetic, x.shape, x.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With no ratio: dx = G W + s (G B) A in x's dtype; dA, dB in float32."""
        x_TI, h_TR, A_RI, B_OR, stored = ctx.saved_tensors
        dtype, scaling = ctx.arithmetic.compute_dtype, ctx.arithmetic.scaling
        with torch.autocast(G.device.type, enabled=False):
            G_TO = G.reshape(-1, G.shape[-1]).to(dtype)
            GB_TR = product(G_TO, B_OR.to(dtype).T)
            dB_OR = scaling * product(h_TR.T, G_TO.T).T.float()
            dA_RI = scaling * (GB_TR.T @ x_TI).float()
            dx = None
            if ctx.needs_input_grad[2]:
                dx_TI = product(G_TO, ctx.arithmetic.decode(stored, dtype=dtype).T)
                dx_TI.addmm_(GB_TR, A_RI.to(dtype), alpha=scaling)
                dx = dx_TI.to(ctx.x_dtype).reshape(ctx.x_shape)
        return None, None, dx, dA_RI, dB_OR, None, None


class DoraLayer(nn.Module):
    """A layer of any kind: a frozen base, and A, B, m that train in float32 (D11); what is linear in it is `Rule`'s.

    With `DoraConfig(method="lora")` it has no magnitude (`magnitude` is None) and c is 1.

    Args:
        base: the frozen weight; it decodes to rows, (O, row).
        bias: the frozen bias (O), or None (D8: added after scaling, never scaled).
        config: rank, scaling, dropout and compute dtype (None is the base's); targets and storage play no part here.
        rows: the weight's rows (D3).
        down: what the layer does with its input by the rows of W or A; `up` likewise by those of B.
    """

    def __init__(
        self,
        base: DenseBase | PackedBase,
        bias: Tensor | None,
        config: DoraConfig,
        *,
        rows: Rows,
        down: Operation,
        up: Operation,
    ) -> None:
        super().__init__()
        self.config = config
        self.rows = rows
        self.down, self.up = down, up
        self.scaling = config.scaling
        self.compute_dtype = config.compute_dtype or base.dtype
        self.base = base
        self.bias = None if bias is None else FrozenBias(bias)
        shapes = rows.adapter_shapes(config)
        for name in ("lora_A", "lora_B", "magnitude"):  # an order that S2's layouts depend on
            shape = shapes.get(name)
            value = None if shape is None else torch.zeros(shape, dtype=torch.float32, device=base.weight.device)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self._draw_factors()
        self.reset_magnitude()

    @torch.no_grad()
    def _draw_factors(self) -> None:
        """D12: A as PEFT draws it, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The layer on x, any floating dtype; y has x's dtype.

        Args:
            x: (..., in_features), or what this kind of layer reads.
            keep: which numbers of x dropout keeps (bool, x's shape). None draws it from torch's default generator while
                training, and drops nothing in evaluation or at `DoraConfig(dropout=0)`.
        """
        bias_O = None if self.bias is None else self.bias()
        tensors = (x, self.lora_A, self.lora_B, self.magnitude, bias_O)
        keep = self._drawn(x) if keep is None else keep
        return self.base(self._product, *tensors) if keep is None else self.base(self._by_rule, *tensors, keep)

    def _drawn(self, x: Tensor) -> Tensor | None:
        """D9: which numbers of x are kept, while training with dropout."""
        drops = self.training and self.config.dropout > 0
        return draw(x, rate=self.config.dropout) if drops else None

    def _product(self, base: DenseBase | PackedBase, *tensors: Tensor | None) -> Tensor:
        """Run by the base, in its forward: nothing is dropped."""
        return self._by_rule(base, *tensors, None)

    def _by_rule(self, base: DenseBase | PackedBase, *tensors: Tensor | None) -> Tensor:
        """Run by the base, in its forward."""
        rule = Rule(
            down=self.down,
            up=self.up,
            scaling=self.scaling,
            compute_dtype=self.compute_dtype,
            decode=base.decode,
            norm=self.row_norms,
            kept_scale=1 / (1 - self.config.dropout),
        )
        return RuleProduct.apply(rule, base.weight, *tensors)

    def _by_groups(self, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W (G, O / G, K), A (G, R, K) and B (G, O / G, R) as matrices."""
        groups, rank = self.rows.groups, self.config.rank
        return W.reshape(groups, -1, self.rows.length), A.reshape(groups, rank, -1), B.reshape(groups, -1, rank)

    def row_norms(self, W: Tensor, A: Tensor, B: Tensor) -> Float[Tensor, " O"]:
        """D3: n of W + s B A, group by group."""
        W_GOK, A_GRK, B_GOR = self._by_groups(W, A, B)
        if self.rows.groups == 1:
            return weight_norm(W_GOK[0], A_GRK[0], B_GOR[0], scaling=self.scaling)
        return grouped_weight_norm(W_GOK, A_GRK, B_GOR, scaling=self.scaling)

    def _norm(self, base: DenseBase | PackedBase, A: Tensor, B: Tensor) -> Tensor:
        """Run by the base, in its forward: n of the present A, B."""
        return self.row_norms(base.decode(base.weight, dtype=self.compute_dtype), A, B)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """D6: m = n of the weight the forward multiplies by and the present A, B; 0 on rows where n is 0 (D7).

        Raises:
            MagnitudeRangeError: a row's norm is beyond float32.
            ShardingError: the layer is sharded already.
        """
        if self.magnitude is None:
            return
        if is_sharded(self):
            raise ShardingError("reset_magnitude needs the whole layer", hint="call it before shard_model")
        n_O = self.base(self._norm, self.lora_A, self.lora_B)
        finite_O = torch.isfinite(n_O)
        if not bool(finite_O.all()):
            row = int((~finite_O).nonzero()[0])
            raise MagnitudeRangeError(f"the norm of row {row} is beyond float32", hint="rescale the weight")
        self.magnitude.copy_(n_O)

    @torch.no_grad()
    def merged_weight(self) -> Float[Tensor, "O *row"]:
        """D10: c * V by rows, in float32, of the weight the forward multiplies by."""
        return self.base(self._merge, self.lora_A, self.lora_B, self.magnitude)

    def _merge(self, base: DenseBase | PackedBase, A: Tensor, B: Tensor, m_O: Tensor | None) -> Tensor:
        """Run by the base, in its forward."""
        W = base.decode(base.weight, dtype=self.compute_dtype)
        W_GOK, A_GRK, B_GOR = self._by_groups(W, A, B)
        V_OK = torch.baddbmm(W_GOK.float(), B_GOR, A_GRK, alpha=self.scaling).reshape(self.rows.out, -1)
        merged = V_OK if m_O is None else V_OK * ratio(m_O, self.row_norms(W, A, B))[:, None]
        return merged.reshape(self.rows.out, *self.rows.row)

    def extra_repr(self) -> str:
        """What the constructor was told."""
        sizes = f"in_features={self.rows.length}, out_features={self.rows.out}, rank={self.config.rank}"
        return f"{sizes}, scaling={self.scaling}, compute_dtype={self.compute_dtype}"


class DoraLinear(DoraLayer):
    """A linear layer y = c * (x W' + s (x A') B') + b.

    Args:
        base: `DoraLayer`'s; where the weight is stored (I, O), a `TransposedBase`.
        bias: `DoraLayer`'s.
        config: `DoraLayer`'s.
        kind: `conv1d` where the layer stands for transformers' Conv1D.
    """

    def __init__(
        self,
        base: DenseBase | PackedBase,
        bias: Tensor | None,
        config: DoraConfig,
        *,
        kind: Literal["linear", "conv1d"] = "linear",
    ) -> None:
        out, fan_in = base.shape
        super().__init__(base, bias, config, rows=Rows(kind, out, (fan_in,)), down=Matrix(), up=Matrix())
        self.out_features, self.in_features = out, fan_in

    def _product(self, base: DenseBase | PackedBase, *tensors: Tensor | None) -> Tensor:
        """Run by the base, in its forward: nothing is dropped."""
        arithmetic = Arithmetic(self.scaling, self.compute_dtype, base.decode)
        if self.magnitude is None:
            return LoraProduct.apply(arithmetic, base.weight, *tensors)
        return DoraProduct.apply(arithmetic, base.weight, *tensors)
