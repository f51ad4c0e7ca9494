"""Clauses S5 and T3, and the loss that S3's mean wants."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from ref import fsdp, training
from ref.types import Adapter


def adapter(seed: int) -> Adapter:
    """Gaussian numbers in an adapter's shape."""
    random = np.random.default_rng(seed)
    return Adapter(*(jnp.asarray(random.normal(size=shape)) for shape in ((2, 4), (5, 2), (5,))))


def test_s3_token_mean_loss_of_unequal_ranks() -> None:
    """The mean over ranks of what each backpropagates is the mean over all tokens."""
    losses = [jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([10.0])]

    mean = sum(training.token_mean_loss(losses_T, total_tokens=4, world_size=2) for losses_T in losses) / 2

    assert float(mean) == 4.0


def test_s5_gradient_norm_is_over_all_shards() -> None:
    """The norm over all shards of all ranks is that of the whole, not of one shard."""
    shards = {"rank0": [jnp.asarray([[3.0, 0.0]])], "rank1": [jnp.asarray([4.0]), jnp.zeros((0, 2))]}

    assert float(training.gradient_norm(shards)) == 5.0


def test_s5_gradient_norm_neither_overflows_nor_underflows() -> None:
    """Gradients of float32's extreme sizes have a norm."""
    sizes = jnp.asarray([3.0, 4.0], jnp.float32)

    norms = [float(training.gradient_norm([sizes * jnp.float32(2.0**power)])) for power in (-120, 120)]

    assert norms == [5 * 2.0**-120, 5 * 2.0**120]


@pytest.mark.parametrize(("norm", "want"), [(0.5, 1.0), (0.0, 1.0), (3.0, 1 / (3 + 1e-6))], ids=str)
def test_s5_clip_coefficient(norm: float, want: float) -> None:
    """Gradients are only ever shortened, by torch's quotient with its addend."""
    assert float(training.clip_coefficient(jnp.asarray(norm), max_norm=1.0)) == want


def test_t3_first_buffer_is_the_gradient() -> None:
    """The first step takes no share of anything: buffer = g, p = p - lr g."""
    parameters, gradients = {"m": jnp.asarray([1.0])}, {"m": jnp.asarray([4.0])}

    parameters, state = training.sgd_momentum(parameters, gradients, None, lr=0.25, momentum=0.5)

    assert state["m"].tolist() == [4.0]
    assert parameters["m"].tolist() == [0.0]


def test_t3_second_buffer_remembers_the_first() -> None:
    """The second step: buffer = momentum * buffer + g, with no (1 - momentum) on g."""
    parameters, state = {"m": jnp.asarray([0.0])}, {"m": jnp.asarray([4.0])}

    parameters, state = training.sgd_momentum(parameters, {"m": jnp.asarray([1.0])}, state, lr=0.25, momentum=0.5)

    assert state["m"].tolist() == [3.0]
    assert parameters["m"].tolist() == [-0.75]


def test_t3_equals_optax_sgd() -> None:
    """Two steps leave what optax.sgd leaves, to the bit."""
    ours, theirs = adapter(0), adapter(0)
    rule = optax.sgd(0.1, momentum=0.9)
    state, their_state = None, rule.init(theirs)

    for seed in (1, 2):
        ours, state = training.sgd_momentum(ours, adapter(seed), state, lr=0.1, momentum=0.9)
        updates, their_state = rule.update(adapter(seed), their_state)
        theirs = optax.apply_updates(theirs, updates)

    assert [leaf.tolist() for leaf in leaves(ours)] == [leaf.tolist() for leaf in leaves(theirs)]


def leaves(adapter: Adapter) -> list[Array]:
    """The arrays of an adapter."""
    return [adapter.lora_A, adapter.lora_B, adapter.magnitude]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_t3_step_on_shards_is_the_shard_of_the_step(rank: int) -> None:
    """Stepping a rank's rows gives the rows of the stepped whole, to the bit."""
    parameters, gradients = adapter(0), adapter(1)

    def held(whole: Adapter) -> Adapter:
        return Adapter(*(fsdp.shard(leaf, world_size=3, rank=rank) for leaf in leaves(whole)))

    whole, _ = training.sgd_momentum(parameters, gradients, None, lr=0.1, momentum=0.9)
    part, _ = training.sgd_momentum(held(parameters), held(gradients), None, lr=0.1, momentum=0.9)
    assert [leaf.tolist() for leaf in leaves(part)] == [leaf.tolist() for leaf in leaves(held(whole))]
