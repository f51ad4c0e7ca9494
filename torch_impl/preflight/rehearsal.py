"""A training step on tensors without memory: what forward and backward hold at their peak, from shapes alone.

Clauses: T1 (the loss), S6 (a packed weight is decoded when it is used).

The model's own code runs, with the layers that `apply_dora` would put in, on torch's fake tensors; a dispatch mode adds
up the bytes of every storage while it lives. Parameters, buffers and the adapters' gradients are not counted:
`costs` does that, for each strategy. What code asks of values (`item`, `nonzero`) is answered with one and
with nothing. The row norms, whose temporaries are bounded by design, are taken for what comes out of them.
"""

import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_impl import inject
from torch_impl.config import DoraConfig
from torch_impl.errors import DoraError
from torch_impl.layers import dora as layers
from torch_impl.training import optim

FEW = 3
"""Blocks that are run of a model with many equal ones: what each further one adds doesn't depend on how many."""


def rehearsed_peak(
    model: nn.Module, dora: DoraConfig | None, *, sequences: int, length: int, depth: int | None = FEW
) -> int | None:
    """The most bytes that one forward and backward hold beyond parameters, buffers and what the optimizer keeps.

    Args:
        model: a causal language model on any device; it isn't changed, and no weight is read or copied.
        dora: adapters that are to be put on first; None where the model has what it is to have.
        sequences: sequences of one forward.
        length: tokens of each.
        depth: equal blocks to run; what one block more takes is then added for each of the others. None runs all.

    Returns:
        Bytes, whole gradients of the adapters included; None for a model whose code can't run without values.
    """
    blocks = _equal_blocks(model)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # an operation it lacks is no news
    try:
        if depth is None or blocks is None or len(model.get_submodule(blocks)) <= depth + 1:
            return _peak(_actor(model, dora), sequences, length)
        few, more = (_peak(_actor(model, dora, blocks=blocks, keep=depth + i), sequences, length) for i in (0, 1))
    except (DoraError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return None  # whatever its code does with values, it can't do it without any; or the adapter is refused
    return few + (len(model.get_submodule(blocks)) - depth) * (more - few)


def _equal_blocks(model: nn.Module) -> str | None:
    """The name of the longest list of modules whose members have the same parameters; lists in such members aside."""
    found: tuple[int, str | None] = (0, None)
    for name, module in model.named_modules():
        inner = found[1] is not None and name.startswith(f"{found[1]}.")
        if isinstance(module, nn.ModuleList) and not inner and len(module) > found[0]:
            kinds = {tuple((n, p.shape, p.dtype) for n, p in block.named_parameters()) for block in module}
            found = (len(module), name) if len(kinds) == 1 else found
    return found[1]


def _peak(actor: Callable[[], nn.Module], sequences: int, length: int) -> int:
    """Run a step of what `actor` makes."""
    with FakeTensorMode(), _Answers(), _norms_alone():
        model = actor()
        tokens_SL = torch.zeros(sequences, length, dtype=torch.long)
        with Storages() as storages:
            _step(model, tokens_SL)
    return storages.peak


def _step(model: nn.Module, tokens_SL: Tensor) -> None:
    """Forward, loss, backward, as `torch_impl.training.train` has them."""
    loss = optim.cross_entropy_sum(model(input_ids=tokens_SL).logits, tokens_SL) / tokens_SL.numel()
    loss.backward()


def _actor(
    model: nn.Module, dora: DoraConfig | None, *, blocks: str | None = None, keep: int = 0
) -> Callable[[], nn.Module]:
    """What makes the model that runs: the same modules over fake tensors, some blocks of it, with its adapters."""

    def make() -> nn.Module:
        copied = _without_memory(model)
        if blocks is not None:
            parent, _, leaf = blocks.rpartition(".")
            setattr(copied.get_submodule(parent), leaf, copied.get_submodule(blocks)[:keep])
        return _with_adapters(copied, dora)

    return make


def _without_memory(model: nn.Module) -> nn.Module:
    """The same modules over fake tensors: a deep copy that is told beforehand what each tensor's copy is."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo)


def _with_adapters(model: nn.Module, dora: DoraConfig | None) -> nn.Module:
    """Dense layers in the place of packed ones, whose decoding makes a tensor of the weight's size."""
    if dora is not None:
        model = inject.apply_dora(model, dataclasses.replace(dora, quant=None))
    for layer in (module for module in model.modules() if isinstance(module, layers.DoraLayer)):
        if isinstance(layer.base, layers.PackedBase):
            layer.base.decode = _decoder(layer.base.format.shape)
        elif dora is not None and dora.quant is not None:
            used = layer.base.decode(layer.base.weight, dtype=layer.compute_dtype)
            layer.base.decode = _decoder(used.shape)
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model.train()


def _decoder(shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """What a packed base does, in shapes."""

    def decode(stored: Tensor, *, dtype: torch.dtype) -> Tensor:
        return stored.new_empty(shape, dtype=dtype)

    return decode


@contextmanager
def _norms_alone() -> Iterator[None]:
    """`weight_norm` gives its result and takes nothing: it would go through the weight in thousands of small blocks."""
    plain = layers.weight_norm

    def weight_norm(W_OI: Tensor, *_: Tensor, **__: float) -> Tensor:
        return W_OI.new_empty(W_OI.shape[0], dtype=torch.float32)

    layers.weight_norm = weight_norm
    try:
        yield
    finally:
        layers.weight_norm = plain


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is on, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it made."""
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """One storage, unless it was there before."""
        if id(storage) in given or id(storage) in self._live:
            return
        self._live[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage))

    def _gone(self, key: int) -> None:
        """Its memory is free again."""
        self.now -= self._live.pop(key, 0)


class _Answers(TorchDispatchMode):
    """What a tensor without memory can't say: every number is 1, every condition true, and a search finds nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer, or run the operation."""
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - an operator's name
            kind = bool if args[0].dtype == torch.bool else float if args[0].is_floating_point() else int
            return kind(1)
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(0, args[0].dim(), dtype=torch.long)
        return func(*args, **(kwargs or {}))
