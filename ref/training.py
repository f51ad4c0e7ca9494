"""The step that follows the gradients: loss, gradient norm, clipping, SGD with momentum. Clauses S5 and T3.

Functions take any pytree of arrays (a whole adapter or one rank's shards of it): every rule but the gradient norm is
elementwise, so a step on shards is the shard of the step.
"""

from typing import Final

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PyTree

from ref.dora import weight_norm

CLIP_ADDEND: Final = 1e-6
"""What torch adds to the gradient norm before dividing by it; optax adds nothing, so the two differ at small norms."""


def token_mean_loss(losses_T: Float[Array, " T"], *, total_tokens: int, world_size: int = 1) -> Float[Array, ""]:
    """S3: what one rank backpropagates so that the mean over ranks is the mean over all tokens.

        L_k = world * sum_t loss_kt / N,        mean_k L_k = sum_kt loss_kt / N

    `total_tokens` is N, counted over all ranks: ranks with unequal token counts then weigh as much as they hold.
    """
    return world_size * jnp.sum(losses_T) / total_tokens


def gradient_norm(gradients: PyTree) -> Float[Array, ""]:
    """S5: the 2-norm over everything at once; give it all shards of all ranks, each once.

    The norm of norms is the norm of the whole: `||g|| = sqrt(sum_k ||g_k||^2)`, scaled as D4 has it.
    """
    parts = [weight_norm(leaf.reshape(1, -1)) for leaf in jax.tree.leaves(gradients)]

    return weight_norm(jnp.concatenate(parts)[None, :])[0]


def clip_coefficient(norm: Float[Array, ""], *, max_norm: float) -> Float[Array, ""]:
    """S5: the factor on every gradient, `min(1, max_norm / (norm + CLIP_ADDEND))`, as torch has it."""
    return jnp.minimum(1, max_norm / (norm + CLIP_ADDEND))


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
