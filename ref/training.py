"""The step that follows the gradients: loss, accumulation, clipping, the optimizers, precision. Clauses S5, T1 to T5.

Functions take any pytree of arrays (a whole adapter or one rank's shards of it): every rule but the gradient norm is
elementwise, so a step on shards is the shard of the step. Each returns new values. One step:

    g = sum over micro-batches of the gradient of sum_t loss_t / N      accumulated    T1
    g = reduce_dtype(g), averaged over ranks, master_dtype(g)           reduced        S3, T4
    g = min(1, c / (||g|| + 1e-6)) g                                    clip           S5, T2
    p = p - lr ...                                                      sgd_momentum, adamw     T3
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, no_type_check

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike
from jaxtyping import Float, Int, PyTree

from ref.dora import weight_norm
from ref.types import InputError

Tree = TypeVar("Tree")

CLIP_ADDEND: Final = 1e-6
"""What torch adds to the gradient norm before dividing by it; optax adds nothing, so the two differ at small norms."""


def token_mean_loss(losses_T: Float[Array, " T"], *, total_tokens: int, world_size: int = 1) -> Float[Array, ""]:
    """S3: what one rank backpropagates so that the mean over ranks is the mean over all tokens.

        L_k = world * sum_t loss_kt / N,        mean_k L_k = sum_kt loss_kt / N

    `total_tokens` is N, counted over all ranks: ranks with unequal token counts then weigh as much as they hold.

    Raises:
        InputError: no token at all, which has no mean.
    """
    if total_tokens < 1:
        raise InputError(f"total_tokens {total_tokens}", hint="count the tokens of all ranks; skip a step without any")
    return world_size * jnp.sum(losses_T) / total_tokens


def accumulated(gradient: Callable[[Any], Tree], batches: Iterable[Any]) -> Tree:
    """T1: the gradient of one large batch, from its parts: their gradients' sum.

        g = sum_k grad(sum_t loss_kt / N)

    Each part's loss is divided by the tokens N of *all* parts (`token_mean_loss`): a mean of the parts' means would
    weigh a short part as much as a long one. Without a reduction in between (`no_sync`, T5) the sum is a rank's own.

    Raises:
        InputError: where there are no batches.
    """
    total = None
    for batch in batches:
        part = gradient(batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
        raise InputError("no batch came", hint="a step takes one or more")

    return total


def checkpointed(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """T5: the same function, whose intermediate results are computed again in the backward pass, not kept.

    The same operations on the same numbers: no bit changes, where the compiler does not join them with others.
    """
    return jax.checkpoint(function)


@dataclass(frozen=True)
class Precision:
    """T4: which numbers are kept in which dtype. Casts happen between these four places and nowhere else."""

    parameter: str = "float32"
    """As parameters are stored, and gathered on the wire."""

    compute: str = "float32"
    """Of activations and of the products; the layer casts A and B itself, never for the norm (D11)."""

    reduction: str = "float32"
    """In which gradients are summed over ranks."""

    master: str = "float32"
    """Of the copy that the optimizer steps, of its state, and of gradients once they are reduced."""

    def require_adapter(self) -> None:
        """D11: refuse to keep, gather or step an adapter in less than float32.

        Raises:
            InputError: where `parameter` or `master` is narrower.
        """
        for place in ("parameter", "master"):
            dtype = getattr(self, place)
            if jnp.finfo(dtype).bits < jnp.finfo(jnp.float32).bits:
                raise InputError(
                    f"{place} {dtype} would round an adapter", hint="float32 or wider; compute may be less"
                )


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """T4: every floating array in another dtype; integers stay."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def reduced(gradients: Sequence[Tree], precision: Precision) -> Tree:
    """T4, S3: the mean over ranks of their gradients, summed in the reduction's dtype, then in the master's."""
    narrow = [cast(gradient, precision.reduction) for gradient in gradients]
    mean = jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]) / len(parts), *narrow)

    return cast(mean, precision.master)


def gradient_norm(gradients: PyTree) -> Float[Array, ""]:
    """S5: the 2-norm over everything at once; give it all shards of all ranks, each once.

    The norm of norms is the norm of the whole: `||g|| = sqrt(sum_k ||g_k||^2)`, scaled as D4 has it.
    """
    parts = [weight_norm(leaf.reshape(1, -1)) for leaf in jax.tree.leaves(gradients)]

    return weight_norm(jnp.concatenate(parts)[None, :])[0]


def clip_coefficient(norm: Float[Array, ""], *, max_norm: float) -> Float[Array, ""]:
    """S5: the factor on every gradient, `min(1, max_norm / (norm + CLIP_ADDEND))`, as torch has it."""
    return jnp.minimum(1, max_norm / (norm + CLIP_ADDEND))


def clip(gradients: Tree, *, max_norm: float, norm: Float[Array, ""] | None = None) -> tuple[Tree, Float[Array, ""]]:
    """T2: the gradients, shortened to `max_norm` by S5's coefficient, and their norm before.

    Args:
        gradients: all of them, or one rank's shards.
        max_norm: the length that is left as it is.
        norm: over all shards of all ranks, where `gradients` are but some; that of `gradients` if not given.

    Raises:
        InputError: a `max_norm` below 0, which would turn every gradient round.
    """
    if max_norm < 0:
        raise InputError(f"max_norm {max_norm}", hint="give a length, 0 or more")
    norm = gradient_norm(gradients) if norm is None else norm
    coefficient = clip_coefficient(norm, max_norm=max_norm)

    return jax.tree.map(lambda gradient: coefficient.astype(gradient.dtype) * gradient, gradients), norm


def sgd_momentum(
    parameters: PyTree, gradients: PyTree, state: PyTree | None, *, lr: float, momentum: float
) -> tuple[PyTree, PyTree]:
    """T3: one step of SGD with momentum, as `torch.optim.SGD(lr=lr, momentum=momentum)` takes it.

        buffer = momentum * buffer + gradient,        parameter = parameter - lr * buffer

    `state` is the tree of buffers, None before the first step: the first buffer is the gradient itself.
    """
    trace = optax.trace(decay=momentum)
    before = trace.init(parameters) if state is None else optax.TraceState(state)

    buffers, after = trace.update(gradients, before)
    updates = jax.tree.map(lambda buffer: -lr * buffer, buffers)

    return optax.apply_updates(parameters, updates), after.trace


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class AdamState:
    """T3: what AdamW remembers between steps."""

    count: Int[Array, ""]
    """How many steps have been taken."""

    first: PyTree
    """The running mean of gradients, in the shape of the parameters."""

    second: PyTree
    """The running mean of their squares."""


def adam_start(parameters: PyTree) -> AdamState:
    """T3: no step taken: zeros in the shape of the parameters, and placed as they are."""
    first, second = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))  # two: a jitted step may reuse each

    return AdamState(jnp.zeros((), jnp.int32), first, second)


def adamw(
    parameters: Tree,
    gradients: Tree,
    state: AdamState | None,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tree, AdamState]:
    """T3: one step of AdamW (arXiv:1711.05101), as `torch.optim.AdamW` takes it; its defaults too.

        m = b1 m + (1 - b1) g,        v = b2 v + (1 - b2) g^2,        in the k-th step
        p = (1 - lr weight_decay) p - lr / (1 - b1^k) * m / (sqrt(v / (1 - b2^k)) + eps)

    `state` is None before the first step. (Not optax's: strict dtype promotion refuses its correction, which takes the
    difference 1 - b2^k in the parameters' dtype besides, and so loses ten bits of it in float32.)
    """
    state = adam_start(parameters) if state is None else state
    count, (b1, b2) = state.count + 1, betas
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradients)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * (g * g), state.second, gradients)

    def stepped(p: Array, m: Array, v: Array) -> Array:
        corrected, root = m / _correction(b1, count, p), jnp.sqrt(v / _correction(b2, count, p))
        return (1 - lr * weight_decay) * p - lr * (corrected / (root + eps))

    return jax.tree.map(stepped, parameters, first, second), AdamState(count, first, second)


def _correction(beta: float, count: Int[Array, ""], like: Array) -> Float[Array, ""]:
    """T3: `1 - beta^count`, with no cancellation."""
    return -jnp.expm1(count.astype(like.dtype) * math.log(beta))
