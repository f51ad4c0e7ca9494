"""Experts: the layers that a mixture holds as one 3-D parameter, each adapted by itself.

Axes: E experts, O output features, I input features, R adapter rank, T the tokens that visit one expert.
Clauses: D16; D2 to D13 for each expert; S8.

transformers' experts hold `gate_up_proj` and `down_proj`, (E, O, I) or, where they say `is_transposed`, (E, I, O), and
their own forward takes one expert's matrix at a time. That forward stays: the module becomes an heir of its class that
lends it, in the parameter's place, something whose `[e]` multiplies as expert e's DoRA layer does. So the router, the
gate, the biases and the sum over experts remain the model's.

    experts.forward -> gate_up_proj (A, B, m whole) -> its base (W whole) -> down_proj ... -> the model's own forward
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from torch_impl.config import DoraConfig
from torch_impl.errors import TargetError
from torch_impl.layers.bases import DenseBase, PackedBase
from torch_impl.layers.described import Described
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.norm import weight_norm
from torch_impl.layers.rows import Rows
from torch_impl.layers.rule import Matrix, Rule, RuleProduct, draw

MATRICES = 3
"""Axes of a parameter that is a stack of matrices."""


@dataclass(frozen=True)
class Stack:
    """A 3-D parameter of a module of experts: what an adapter is put on, as a layer is elsewhere."""

    owner: nn.Module
    """The module of experts."""
    leaf: str
    """The parameter's name there."""

    @property
    def weight(self) -> nn.Parameter:
        """(E, O, I), or (E, I, O)."""
        return self.owner.get_parameter(self.leaf)

    @property
    def training(self) -> bool:
        """As its module."""
        return self.owner.training

    @property
    def transposed(self) -> bool:
        """Whether it is stored (E, I, O)."""
        return bool(getattr(self.owner, "is_transposed", False))


def is_stack(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter is a stack of experts' matrices, and its module says which way they lie."""
    parameter = module._parameters.get(leaf)  # noqa: SLF001 - its own, not a child's
    return parameter is not None and parameter.dim() == MATRICES and hasattr(module, "is_transposed")


class DoraExperts(DoraLayer):
    """One stack of experts' matrices, frozen, with A (E, R, I), B (E, O, R) and m (E, O) that train.

    Args:
        base: the frozen weight; it decodes to (E, O, I).
        rows: the weight's rows.
        transposed: whether the model stores it (E, I, O).
        config: `DoraLayer`'s.
    """

    kind = "experts"
    packs = True

    def __init__(self, base: DenseBase | PackedBase, rows: Rows, config: DoraConfig, *, transposed: bool) -> None:
        super().__init__(base, None, config, rows=rows, down=Matrix(), up=Matrix())
        self.transposed = transposed

    @property
    def weight(self) -> Described:
        """The parameter's shape, its dtype, where it lies."""
        shape = (self.rows.groups, *self.rows.matrix)
        shape = (shape[0], shape[2], shape[1]) if self.transposed else shape
        return Described.of(shape, self.base.dtype, self.base.weight.device)

    @staticmethod
    def standard() -> tuple[type, ...]:
        """A parameter, and no module."""
        return (Stack,)

    @staticmethod
    def rows_in(module: Stack) -> Rows:
        """Experts are groups, that share nothing."""
        experts, out, row = module.weight.shape
        out, row = (row, out) if module.transposed else (out, row)
        return Rows("experts", experts * out, (row,), experts)

    @classmethod
    def stores_transposed(cls, module: Stack) -> bool:
        """As its module says."""
        return module.transposed

    @classmethod
    def over(cls, module: Stack, base: Any, config: DoraConfig) -> "DoraExperts":
        """The model adds its biases itself."""
        return cls(base, cls.rows_in(module), config, transposed=module.transposed)

    def plain(self) -> nn.Module:
        """No module stands for a parameter.

        Raises:
            TargetError: always; `give_back` undoes `lend`.
        """
        raise TargetError("a stack of experts is no module", hint="use torch_impl.layers.experts.give_back")

    @property
    def is_pefts(self) -> bool:
        """PEFT refuses DoRA on parameters; its LoRA is ours."""
        return self.config.method == "lora"

    @staticmethod
    def to_peft(leaf: str, tensor: Tensor, rows: Rows) -> Tensor:
        """C1: A as (E R, I), B as (O, R E) with the experts innermost; m stays (E, O)."""
        if leaf == "lora_A":
            return tensor.reshape(-1, rows.length)
        return tensor.permute(1, 2, 0).reshape(rows.matrix[0], -1) if leaf == "lora_B" else tensor

    @staticmethod
    def from_peft(leaf: str, tensor: Tensor, rows: Rows) -> Tensor:
        """C1: B as (E, O, R) again."""
        return tensor.reshape(rows.matrix[0], -1, rows.groups).permute(2, 0, 1) if leaf == "lora_B" else tensor

    @torch.no_grad()
    def _draw_factors(self) -> None:
        """D12: A as PEFT draws the experts' together, (E R, I); B zero."""
        nn.init.kaiming_uniform_(self.lora_A.view(-1, self.rows.length), a=5**0.5)

    def row_norms(self, W: Tensor, A: Tensor, B: Tensor) -> Float[Tensor, " O"]:
        """D3: n of every expert, one after the other."""
        return torch.cat(
            [weight_norm(*one, scaling=self.scaling) for one in zip(*self._by_groups(W, A, B), strict=True)]
        )

    def forward(self, work: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What `work(lent, *args, **kwargs)` returns, while the weight is whole."""

        def inside(base: DenseBase | PackedBase, *tensors: Any) -> Tensor:
            """Run by the base, in its forward."""
            factors, args = tensors[:3], tensors[3:]
            lent = Lent(self, base, factors)
            y = work(lent, *args, **kwargs)
            return y if lent.visited else Untouched.apply(y, *(tensor for tensor in factors if tensor is not None))

        return self.base(inside, self.lora_A, self.lora_B, self.magnitude, *args)

    def expert(self, base: DenseBase | PackedBase, index: int, factors: tuple[Tensor | None, ...], x: Tensor) -> Tensor:
        """Expert `index` on the tokens that visit it: a DoRA layer like any other."""
        stored, decode = base.matrix(index)
        rule = Rule(
            down=self.down,
            up=self.up,
            scaling=self.scaling,
            compute_dtype=self.compute_dtype,
            decode=decode,
            norm=partial(weight_norm, scaling=self.scaling),
            kept_scale=1 / (1 - self.config.dropout),
        )
        keep = draw(x, rate=self.config.dropout) if self.training and self.config.dropout > 0 else None
        return RuleProduct.apply(rule, stored, x, *factors, None, keep)


class Lent:
    """What stands in the parameter's place: `[e]` is what multiplies as expert e."""

    def __init__(self, layer: DoraExperts, base: DenseBase | PackedBase, factors: tuple[Any, ...]) -> None:
        self.layer, self.base = layer, base
        A, B, m = factors
        each = [None] * layer.rows.groups if m is None else m.unbind()
        self.factors = tuple(zip(A.unbind(), B.unbind(), each, strict=True))
        self.visited = False

    def __getitem__(self, expert: int | Tensor) -> "_Expert":
        if not isinstance(expert, int) and (expert.dim() > 0 or expert.dtype == torch.bool):
            raise _strange(f"takes {tuple(expert.shape)} experts at once")
        return _Expert(self, int(expert))

    def __getattr__(self, name: str) -> Any:
        raise _strange(f"asks its weight for {name}")


class _Expert:
    """One expert's matrix, for whom multiplies by it as its orientation wants."""

    def __init__(self, lent: Lent, index: int) -> None:
        self.lent, self.index = lent, index

    def times(self, x: Tensor) -> Tensor:
        """The tokens x (T, I) -> (T, O)."""
        self.lent.visited = True
        return self.lent.layer.expert(self.lent.base, self.index, self.lent.factors[self.index], x)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`linear(x, W)` of matrices (O, I), `x @ W` of matrices (I, O); anything else isn't ours to answer."""
        del types
        x, matrix, *more = (*args, None)
        if isinstance(matrix, _Expert) and more in ([None], [None, None]) and not kwargs:
            transposed = matrix.lent.layer.transposed
            if function is functional.linear and not transposed:
                return matrix.times(x)
            if function in _PRODUCTS and transposed:
                return matrix.times(x)
        raise _strange(f"uses {getattr(function, '__name__', function)} on it")


_PRODUCTS = (Tensor.__matmul__, Tensor.matmul, torch.matmul, torch.mm, Tensor.mm)


def _strange(what: str) -> TargetError:
    return TargetError(
        f"a forward of experts that {what}, and not one expert's product after the other, can't be adapted",
        hint="leave its parameters out of target_parameters",
    )


class Untouched(torch.autograd.Function):
    """Y as it is, and zeros for adapters that no token has met: every rank has a gradient of each (S3)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *adapter: Tensor) -> Tensor:
        """The same numbers."""
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in adapter]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Y's gradient, and zeros."""
        return G, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class Lending(nn.Module):
    """What a module of experts becomes an heir of, besides its own class."""

    own_class: ClassVar[type[nn.Module]]
    """The class that it had."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The class' own forward, one expert after the other, with every adapted parameter lent."""
        names = [name for name, child in self.named_children() if isinstance(_inner(child), DoraExperts)]
        return self._with(names, {}, *args, **kwargs)

    def _with(self, names: list[str], lent: dict[str, Lent], /, *args: Any, **kwargs: Any) -> Tensor:
        if names:
            first, *others = names

            def work(one: Lent, *args: Any, **kwargs: Any) -> Tensor:
                return self._with(others, lent | {first: one}, *args, **kwargs)

            return self.get_submodule(first)(work, *args, **kwargs)
        self.__dict__.update(lent)  # found before children are
        try:
            return inspect.unwrap(self.own_class.forward)(self, *args, **kwargs)
        finally:
            for name in lent:
                del self.__dict__[name]


@cache
def _lending(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Dora{kind.__name__}", (Lending, kind), {"own_class": kind})


def lend(stack: Stack, layer: DoraExperts) -> None:
    """Put the layer in the parameter's place; once, where the module has two names."""
    if stack.leaf not in stack.owner._parameters:  # noqa: SLF001 - as below
        return
    del stack.owner._parameters[stack.leaf]  # noqa: SLF001 - torch has no other way to take one away
    stack.owner.register_module(stack.leaf, layer)
    if not isinstance(stack.owner, Lending):
        stack.owner.__class__ = _lending(type(stack.owner))


@torch.no_grad()
def give_back(owner: Any, leaf: str, weight: Float[Tensor, "O I"]) -> None:
    """Put a plain parameter in the layer's place, as the model stores it; of rows, those of all experts in turn."""
    layer: Any = owner.get_submodule(leaf)
    matrices = weight.view(layer.rows.groups, *layer.rows.matrix)
    stored = matrices.mT.contiguous() if layer.transposed else matrices
    delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(stored, requires_grad=False))
    if not any(isinstance(child, DoraExperts) for child in owner.children()):
        owner.__class__ = owner.own_class


def _inner(module: nn.Module) -> nn.Module:
    """The module itself where FSDP1 wraps it."""
    return getattr(module, "_fsdp_wrapped_module", module)
