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

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl.config import DoraConfig
from torch_impl.errors import MagnitudeRangeError, ShardingError
from torch_impl.layers.bases import DenseBase, FrozenBias, PackedBase
from torch_impl.layers.cut import Cut, local
from torch_impl.layers.described import Described
from torch_impl.layers.norm import grouped_weight_norm, ratio, weight_norm
from torch_impl.layers.rows import Kind, Rows
from torch_impl.layers.rule import Matrix, Operation, Rule, RuleProduct, draw
from torch_impl.wrappers import is_sharded


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

    kind: ClassVar[Kind]
    """Its name in `Rows.kind`."""
    linear: ClassVar[bool] = False
    """Whether "all-linear" means it."""
    packs: ClassVar[bool] = False
    """Whether its weight may be packed in four bits."""
    transposed: ClassVar[bool] = False
    """Whether the layer that it stands for stores its weight (row, O)."""
    peft_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"
    }  # fmt: skip
    """C1: what PEFT calls its tensors."""

    @staticmethod
    @abstractmethod
    def standard() -> tuple[type, ...]:
        """The classes that it stands for, and whose forward it computes."""

    @staticmethod
    @abstractmethod
    def rows_in(module: Any) -> Rows:
        """The rows of such a layer's weight."""

    @classmethod
    def stores_transposed(cls, module: Any) -> bool:
        """Whether such a layer stores its weight (row, O)."""
        del module
        return cls.transposed

    @classmethod
    @abstractmethod
    def over(cls, module: Any, base: Any, config: DoraConfig) -> "DoraLayer":
        """The layer in a standard one's place."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """The standard layer again, without weights: on the meta device."""

    @staticmethod
    def to_peft(leaf: str, tensor: Tensor, rows: Rows) -> Tensor:
        """C1: a tensor of ours in the shape that PEFT gives it."""
        del leaf, rows
        return tensor

    @staticmethod
    def from_peft(leaf: str, tensor: Tensor, rows: Rows) -> Tensor:
        """C1: a tensor of PEFT's in our order; the shape is then ours by `reshape`."""
        del leaf, rows
        return tensor

    @property
    def is_pefts(self) -> bool:
        """C1: whether PEFT computes the same function from the same factors."""
        return True

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
        self.cut: Cut | None = None  # S10: set where tensor ranks share the layer
        shapes = rows.adapter_shapes(config)
        for name in ("lora_A", "lora_B", "magnitude"):  # an order that S2's layouts depend on
            shape = shapes.get(name)
            value = None if shape is None else torch.zeros(shape, dtype=torch.float32, device=base.weight.device)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self._draw_factors()
        self.reset_magnitude()

    @property
    def weight(self) -> Described:
        """For a model that asks: the plain layer's shape, its dtype, where it lies; nothing can be computed of it."""
        shape = (*self.rows.row, self.rows.out) if self.transposed else (self.rows.out, *self.rows.row)
        return Described.of(shape, self.base.dtype, self.base.weight.device)

    @torch.no_grad()
    def _draw_factors(self) -> None:
        """D12: A as PEFT draws it, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The layer on x, any floating dtype; y has x's dtype.

        Args:
            x: (..., in_features), or what this kind of layer reads.
            keep: which numbers of x dropout keeps (bool, x's shape; or of the whole input, where x is a tensor rank's
                features of it). None draws it from torch's default generator while training, and drops nothing in
                evaluation or at `DoraConfig(dropout=0)`.
        """
        bias_O = None if self.bias is None else self.bias()
        if self.cut is not None:
            x = self.cut.enter(x)
        adapter = (p if p is None else local(p) for p in (self.lora_A, self.lora_B, self.magnitude))
        keep = self._own(self._drawn(x) if keep is None else keep, x)
        y = self.base(self._by_rule, x, *adapter, bias_O, keep)
        return y if self.cut is None else self.cut.leave(y)

    def _drawn(self, x: Tensor) -> Tensor | None:
        """D9: which numbers of x are kept, while training with dropout; all tensor ranks draw the whole mask (S10)."""
        if not self.training or self.config.dropout == 0:
            return None
        splits = self.cut is not None and self.cut.splits_rows
        whole = x.new_empty(()).expand(*x.shape[:-1], self.rows.length) if splits else x
        return draw(whole, rate=self.config.dropout)

    def _own(self, keep: Tensor | None, x: Tensor) -> Tensor | None:
        """S10: a mask of the whole input for this rank's features of it."""
        return keep if keep is None or self.cut is None or keep.shape == x.shape else self.cut.own(keep)

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
            cut=self.cut,
        )
        return RuleProduct.apply(rule, local(base.weight), *tensors)

    def _by_groups(self, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W (G, O / G, K), A (G, R, K) and B (G, O / G, R) as matrices; K and O are a tensor rank's (S10)."""
        groups, rank = self.rows.groups, self.config.rank
        A_GRK = A.reshape(groups, rank, -1)
        return W.reshape(groups, -1, A_GRK.shape[2]), A_GRK, B.reshape(groups, -1, rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoraLayer":
        """D11: `model.to(dtype)` moves A, B and m, and casts only what is frozen."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        for child in self.children() if recurse else ():
            child._apply(fn)  # noqa: SLF001 - as torch's own does
        return super()._apply(moved, recurse=False)

    def row_norms(self, W: Tensor, A: Tensor, B: Tensor) -> Float[Tensor, " O"]:
        """D3: n of W + s B A, group by group."""
        W_GOK, A_GRK, B_GOR = self._by_groups(W, A, B)
        if self.rows.groups == 1:
            cut = self.cut if self.cut is not None and self.cut.splits_rows else None
            return weight_norm(W_GOK[0], A_GRK[0], B_GOR[0], scaling=self.scaling, cut=cut)
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
        self._require_whole("reset_magnitude")
        n_O = self.base(self._norm, self.lora_A, self.lora_B)
        finite_O = torch.isfinite(n_O)
        if not bool(finite_O.all()):
            row = int((~finite_O).nonzero()[0])
            raise MagnitudeRangeError(f"the norm of row {row} is beyond float32", hint="rescale the weight")
        self.magnitude.copy_(n_O.view_as(self.magnitude))

    @torch.no_grad()
    def merged_weight(self) -> Float[Tensor, "O *row"]:
        """D10: c * V by rows, in float32, of the weight the forward multiplies by.

        Raises:
            ShardingError: the layer is sharded.
        """
        self._require_whole("merged_weight")
        return self.base(self._merge, self.lora_A, self.lora_B, self.magnitude)

    def _require_whole(self, what: str) -> None:
        """Refuse what reads all of the layer where a rank holds a part of it."""
        if is_sharded(self):
            raise ShardingError(f"{what} needs the whole layer", hint="call it before shard_model")

    def _merge(self, base: DenseBase | PackedBase, A: Tensor, B: Tensor, m_O: Tensor | None) -> Tensor:
        """Run by the base, in its forward."""
        W = base.decode(base.weight, dtype=self.compute_dtype)
        W_GOK, A_GRK, B_GOR = self._by_groups(W, A, B)
        V_OK = torch.baddbmm(W_GOK.float(), B_GOR, A_GRK, alpha=self.scaling).reshape(self.rows.out, -1)
        merged = V_OK if m_O is None else V_OK * ratio(m_O.flatten(), self.row_norms(W, A, B))[:, None]
        return merged.reshape(self.rows.out, *self.rows.row)

    def extra_repr(self) -> str:
        """What the constructor was told."""
        sizes = f"in_features={self.rows.length}, out_features={self.rows.out}, rank={self.config.rank}"
        return f"{sizes}, scaling={self.scaling}, compute_dtype={self.compute_dtype}"


class DoraLinear(DoraLayer):
    """A linear layer y = c * (x W' + s (x A') B') + b.

    Args:
        base: `DoraLayer`'s.
        bias: `DoraLayer`'s.
        config: `DoraLayer`'s.
    """

    kind = "linear"
    linear = packs = True

    def __init__(self, base: DenseBase | PackedBase, bias: Tensor | None, config: DoraConfig) -> None:
        out, fan_in = base.shape
        super().__init__(base, bias, config, rows=Rows(self.kind, out, (fan_in,)), down=Matrix(), up=Matrix())
        self.out_features, self.in_features = out, fan_in

    @staticmethod
    def standard() -> tuple[type[nn.Module], ...]:
        """nn.Linear."""
        return (nn.Linear,)

    @staticmethod
    def rows_in(module: Any) -> Rows:
        """Of its sizes: a packed weight has another shape."""
        return Rows("linear", module.out_features, (module.in_features,))

    @classmethod
    def over(cls, module: Any, base: Any, config: DoraConfig) -> "DoraLinear":
        """With its bias."""
        return cls(base, module.bias, config)

    def plain(self) -> nn.Module:
        """nn.Linear."""
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
