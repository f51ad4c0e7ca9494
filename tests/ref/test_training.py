"""Clauses S5 and T1 to T5, and the loss that S3's mean wants."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import Array

from ref import dora, fsdp, training
from ref.training import Precision
from ref.types import Adapter, InputError


def adapter(seed: int) -> Adapter:
    """Gaussian numbers in an adapter's shape."""
    random = np.random.default_rng(seed)
    return Adapter(*(jnp.asarray(random.normal(size=shape)) for shape in ((2, 4), (5, 2), (5,))))


def test_s3_token_mean_loss_of_unequal_ranks() -> None:
    """The mean over ranks of what each backpropagates is the mean over all tokens."""
    losses = [jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([10.0])]

    mean = sum(training.token_mean_loss(losses_T, total_tokens=4, world_size=2) for losses_T in losses) / 2

    assert float(mean) == 4.0


def test_s3_the_mean_of_one_token_is_its_loss() -> None:
    """One token of all ranks' is enough for a mean."""
    assert float(training.token_mean_loss(jnp.asarray([3.0]), total_tokens=1)) == 3.0


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


# T1


def integers(*shape: int, seed: int) -> Array:
    """Small integers: sums of their products are exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float64))


X, W, G = integers(8, 4, seed=1), integers(5, 4, seed=2), integers(8, 5, seed=3)
ADAPTER = Adapter(integers(2, 4, seed=4), integers(5, 2, seed=5), jnp.ones(5))


def gradient(rows: slice) -> Adapter:
    """Of the token-mean loss over all eight tokens, as far as some rows go."""

    def loss(adapter: Adapter) -> Array:
        y_TO = dora.forward_with_ratio(X[rows], W, adapter, c_O=adapter.magnitude, scaling=0.5)
        return training.token_mean_loss(jnp.sum(G[rows] * y_TO, axis=1), total_tokens=8)

    return jax.grad(loss)(ADAPTER)


@pytest.mark.parametrize("cuts", [[0, 4, 8], [0, 1, 3, 8]], ids=["equal", "unequal"])
def test_t1_accumulation_is_one_large_batch(cuts: list[int]) -> None:
    """Gradients of parts, equal or not, add up to that of the whole, to the bit where nothing rounds."""
    parts = [slice(*pair) for pair in pairwise(cuts)]

    got = training.accumulated(gradient, parts)

    assert [leaf.tolist() for leaf in leaves(got)] == [leaf.tolist() for leaf in leaves(gradient(slice(0, 8)))]


def test_t1_no_batch_is_refused() -> None:
    """A step without data is no step."""
    with pytest.raises(InputError, match="no batch"):
        training.accumulated(gradient, [])


# T2


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_t2_clipping_is_torchs(max_norm: float) -> None:
    """Clipped gradients are `clip_grad_norm_`'s, to a few roundings of norm and quotient."""
    ours = adapter(1)
    theirs = [torch.nn.Parameter(torch.zeros(leaf.shape, dtype=torch.float64)) for leaf in leaves(ours)]
    for parameter, leaf in zip(theirs, leaves(ours), strict=True):
        parameter.grad = torch.from_numpy(np.array(leaf))

    clipped, norm = training.clip(ours, max_norm=max_norm)

    terms = sum(leaf.size for leaf in leaves(ours))
    rtol = (terms + 8) * 2.0**-53
    np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rtol=rtol)
    for got, parameter in zip(leaves(clipped), theirs, strict=True):
        np.testing.assert_allclose(got, parameter.grad.numpy(), rtol=2 * rtol)


def test_t2_shards_are_clipped_by_the_norm_of_all() -> None:
    """A rank's shards, given the norm of all ranks, are the shards of the clipped whole, to the bit."""
    whole, norm = training.clip(adapter(1), max_norm=0.5)

    part, _ = training.clip(adapter(1).lora_B[:2], max_norm=0.5, norm=norm)

    assert part.tolist() == whole.lora_B[:2].tolist()


# T3, AdamW


def test_t3_adamw_is_torchs() -> None:
    """Three steps leave torch's parameters and state, to the roundings of either rule."""
    ours, state = adapter(0), None
    theirs = [torch.nn.Parameter(torch.from_numpy(np.array(leaf))) for leaf in leaves(ours)]
    rule = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.2)

    for seed in (1, 2, 3):
        for parameter, leaf in zip(theirs, leaves(adapter(seed)), strict=True):
            parameter.grad = torch.from_numpy(np.array(leaf))
        rule.step()
        ours, state = training.adamw(ours, adapter(seed), state, lr=0.1, weight_decay=0.2)

    roundings = 3 * 16 * 2.0**-53  # some 16 a step in either rule; a parameter moves by lr (1 + decay |p|) at most
    for got, parameter in zip(leaves(ours), theirs, strict=True):
        want = parameter.detach().numpy()
        assert bool(jnp.all(jnp.abs(got - want) <= roundings * (jnp.abs(want) + 3 * 0.1)))
    for got, parameter in zip(leaves(state.second), theirs, strict=True):
        np.testing.assert_allclose(got, rule.state[parameter]["exp_avg_sq"].numpy(), rtol=roundings)


def test_t3_adamw_correction_does_not_cancel() -> None:
    """In float32, 1 - 0.999 is right to its last bits, not to the fourteen that a difference would leave."""
    got = training._correction(0.999, jnp.asarray(1, jnp.int32), jnp.zeros((), jnp.float32))

    assert abs(float(got) - 0.001) <= 4 * 2.0**-24 * 0.001


def test_t3_adamw_steps_on_shards() -> None:
    """Stepping some rows gives the rows of the stepped whole, to the bit."""
    whole, state = training.adamw(adapter(0), adapter(1), None, lr=0.1)
    whole, _ = training.adamw(whole, adapter(2), state, lr=0.1)

    part, state = training.adamw(adapter(0).lora_B[1:3], adapter(1).lora_B[1:3], None, lr=0.1)
    part, _ = training.adamw(part, adapter(2).lora_B[1:3], state, lr=0.1)

    assert part.tolist() == whole.lora_B[1:3].tolist()


# T4, T5


def test_t4_reduction_has_its_dtype() -> None:
    """Gradients are rounded to the reduction's dtype once, summed in it, and kept in the master's."""
    gradients = [{"m": jnp.asarray([1.0, 256.0], jnp.float32)}, {"m": jnp.asarray([1.0 + 2**-9, 1.0], jnp.float32)}]

    got = training.reduced(gradients, Precision(reduction="bfloat16"))

    assert got["m"].dtype == jnp.float32
    assert got["m"].tolist() == [1.0, 128.0]  # 1 + 2^-9 and 257 are no bf16 numbers


def test_t4_cast_leaves_integers() -> None:
    """Token identifiers stay integers, whatever the compute dtype."""
    got = training.cast({"x": jnp.ones(2), "ids": jnp.arange(2)}, "bfloat16")

    assert (got["x"].dtype, got["ids"].dtype) == (jnp.bfloat16, jnp.int64)


@pytest.mark.parametrize("place", ["parameter", "master"])
def test_t4_an_adapter_is_not_narrowed(place: str) -> None:
    """A policy that keeps or gathers adapters in bf16 is refused, one that computes in it is not (D11)."""
    Precision(compute="bfloat16", reduction="bfloat16").require_adapter()

    with pytest.raises(InputError, match=place):
        Precision(**{place: "bfloat16"}).require_adapter()


def layer(x_TI: Array, adapter: Adapter) -> Array:
    """A DoRA layer and something nonlinear."""
    return jnp.sum(jax.nn.relu(dora.forward(x_TI, W, adapter, scaling=0.5)) ** 2)


def test_t5_checkpointing_changes_no_bit() -> None:
    """Computed again in the backward pass, every gradient keeps its bits, on any data."""
    kept = jax.grad(layer, argnums=1)(0.1 * X, adapter(0))

    again = jax.grad(training.checkpointed(layer), argnums=1)(0.1 * X, adapter(0))

    assert [leaf.tolist() for leaf in leaves(again)] == [leaf.tolist() for leaf in leaves(kept)]


def test_t5_reducing_once_is_reducing_each_time() -> None:
    """Summed on each rank and then reduced (`no_sync`), lattice gradients are those reduced every time, to the bit."""
    by_rank = [[gradient(slice(0, 2)), gradient(slice(2, 4))], [gradient(slice(4, 6)), gradient(slice(6, 8))]]

    once = training.reduced([training.accumulated(lambda g: g, parts) for parts in by_rank], Precision())
    each = training.accumulated(lambda pair: training.reduced(pair, Precision()), zip(*by_rank, strict=True))

    assert [leaf.tolist() for leaf in leaves(once)] == [leaf.tolist() for leaf in leaves(each)]


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda: training.clip({"a": jnp.ones(2)}, max_norm=-1.0), "max_norm -1.0"),
        (lambda: training.token_mean_loss(jnp.ones(2), total_tokens=0), "total_tokens 0"),
    ],
    ids=["negative length", "no tokens"],
)
def test_what_would_turn_or_blow_up_a_gradient_is_refused(refused, said):
    """Neither would raise by itself."""
    with pytest.raises(InputError, match=said):
        refused()
