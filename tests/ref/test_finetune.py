"""A Llama fine-tuned in four bits, cut over a mesh: the same function wherever its arrays lie. D6, D12, Q4, Q6, S1."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from ref import checkpoint, finetune, llama, mesh, quant, quant_fast, training
from ref.checkpoint import Parameters
from ref.types import Adapter, InputError, PackedWeight

EQUAL = 1e-9
"""Float64 on both sides, sums in different orders: some 1e4 u, and more room still."""
SCALING = 2.0
CONFIG = checkpoint.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope={"rope_theta": 1e4, "rope_type": "default"},
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=False,
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, 64)


def dense() -> Parameters:
    """Random float32 parameters, stacked."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return jnp.asarray(random.standard_normal(shape) / np.sqrt(shape[-1]), jnp.float32)

    layers = {name: draw(3, *shape) for name, shape in checkpoint.layer_shapes(CONFIG).items()}
    return Parameters(draw(64, 32), layers, jnp.ones(32, jnp.float32), draw(64, 32))


def widened(parameters: Parameters) -> Parameters:
    """In float64, but for what is packed."""

    def wide(leaf):
        return leaf if isinstance(leaf, PackedWeight) else leaf.astype(jnp.float64)

    return jax.tree.map(wide, parameters, is_leaf=lambda leaf: isinstance(leaf, PackedWeight))


@cache
def packed() -> Parameters:
    """The same, quantised, computing in float64."""
    return widened(finetune.quantised(dense()))


@cache
def adapters() -> dict[str, Adapter]:
    """With B and magnitudes off their start."""
    made = finetune.initial_adapters(packed(), jax.random.key(2), rank=4, scaling=SCALING)

    def moved(adapter: Adapter) -> Adapter:
        noise = jax.random.normal(jax.random.key(3), adapter.lora_B.shape, jnp.float64)
        return Adapter(adapter.lora_A.astype(float), 0.1 * noise, 1.1 * adapter.magnitude.astype(float))

    return {name: moved(adapter) for name, adapter in made.items()}


def loss(adapters: dict[str, Adapter], parameters: Parameters) -> Array:
    """Of the tokens above."""
    options = {"adapters": adapters, "scaling": SCALING}
    return llama.loss(parameters, TOKENS[:, :-1], TOKENS[:, 1:], CONFIG, **options)


value_and_gradients = jax.jit(jax.value_and_grad(loss))


@cache
def whole() -> tuple[Array, dict[str, Adapter]]:
    """Loss and gradients on one device."""
    return jax.device_get(value_and_gradients(adapters(), packed()))


def decoded(parameters: Parameters) -> Parameters:
    """With dense weights in place of packed ones, decoded one by one."""

    def plain(leaf):
        if not isinstance(leaf, PackedWeight):
            return leaf
        weights = [quant.decode(*jax.tree.map(lambda stacked, k=k: stacked[k], leaf)) for k in range(3)]
        return jnp.stack(weights).astype(jnp.float64)

    return replace(parameters, layers={name: plain(leaf) for name, leaf in parameters.layers.items()})


def distance(got, want) -> float:
    """The largest relative 2-norm of a leaf's difference."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(np.asarray(a - b)) / np.linalg.norm(np.asarray(b))) for a, b in pairs)


@pytest.mark.parametrize("count", [64 * 300, 64 * 7 + 3], ids=["whole blocks", "short last block"])
def test_q6_the_fast_encoder_nests_as_the_slow_one(count: int) -> None:
    """With nested scales the fast twin gives the specification's bytes, codes and offset, to the bit."""
    W = jnp.asarray(np.random.default_rng(4).standard_normal(count), jnp.float32)

    got = quant_fast.encode_nf4(W, nested=True)

    want = quant.encode(W, profile="bnb-cpu", nested=True)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def test_q4_a_packed_llama_is_the_llama_of_the_decoded_weights() -> None:
    """Decoding a layer where it is used gives the loss and the gradients of weights that were decoded before."""
    want = value_and_gradients(adapters(), decoded(packed()))

    assert distance(whole(), want) < EQUAL


def test_d12_a_fresh_adapter_changes_nothing() -> None:
    """Fresh adapters of a packed model leave its loss where it was: magnitudes are those of decoded weights."""
    made = finetune.initial_adapters(packed(), jax.random.key(2), rank=4, scaling=SCALING)
    fresh = jax.tree.map(lambda array: array.astype(float), made)

    # magnitudes are float32 numbers, so the ratio is 1 to their rounding
    assert abs(jax.jit(loss)(fresh, packed()) / jax.jit(loss)({}, packed()) - 1) < float(jnp.finfo(jnp.float32).eps)


def test_adapters_by_layer_are_the_stacked_ones() -> None:
    """Both ways to name adapters give one loss, and no layer's adapter stands in another's place."""
    got = jax.jit(loss)(finetune.by_layer(adapters()), packed())

    assert distance(got, whole()[0]) < EQUAL


def test_s1_the_cut_llama_equals_the_whole_one() -> None:
    """Loss and gradients of every adapter are those of one device, wherever the arrays lie."""
    on = mesh.make_mesh(shard=4)
    placed = finetune.cut(adapters(), on), finetune.cut(packed(), on)

    got = value_and_gradients(*placed)

    assert distance(jax.device_get(got), whole()) < EQUAL


def gathers_of_a_layer(program: str) -> int:
    """How many all-gathers the loops over the layers repeat."""
    return sum("all-gather(" in line and "while/body" in line for line in program.splitlines())


def test_s8_adapters_gathered_at_once_train_as_those_that_lie_cut() -> None:
    """Same gradients, laid out as the adapters lie, with fewer collectives than gathering in every layer takes."""
    on = mesh.make_mesh(shard=4)
    placed = finetune.cut(adapters(), on), finetune.cut(packed(), on)
    where = jax.tree.map(lambda array: array.sharding, placed[0])

    def at_once(adapters: dict[str, Adapter], parameters: Parameters) -> Array:
        return loss(finetune.gathered(adapters, on), parameters)

    step = jax.jit(jax.value_and_grad(at_once), out_shardings=(None, where)).lower(*placed).compile()
    got = step(*placed)

    layer_by_layer = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where)).lower(*placed).compile()
    count = [gathers_of_a_layer(compiled.as_text()) for compiled in (step, layer_by_layer)]
    assert distance(jax.device_get(got), whole()) < EQUAL
    assert jax.tree.all(jax.tree.map(lambda gradient, sharding: gradient.sharding == sharding, got[1], where))
    assert 0 < count[0] < count[1]


def test_s1_everything_that_divides_is_cut() -> None:
    """Of bytes, scales, factors, magnitudes, moments, embedding and head each of four devices holds a quarter."""
    on = mesh.make_mesh(shard=4)
    frozen, trained = finetune.cut(packed(), on), finetune.cut(adapters(), on)
    state = finetune.cut(training.adam_start(trained), on)
    weights = [leaf for leaf in frozen.layers.values() if isinstance(leaf, PackedWeight)]

    dealt = [*(w.packed for w in weights), *(w.state.absmax for w in weights), frozen.embedding, frozen.head]
    dealt += jax.tree.leaves((trained, state.first, state.second))
    assert len(weights) == 7
    assert {4 * array.addressable_shards[0].data.size - array.size for array in dealt} == {0}


def test_s1_what_does_not_divide_stays_whole() -> None:
    """An array whose rows do not divide by the ranks lies whole on each."""
    placed = finetune.cut({"a": jnp.zeros((2, 5, 3)), "b": jnp.zeros(8)}, mesh.make_mesh(shard=4))

    assert {shard.data.shape for shard in placed["a"].addressable_shards} == {(2, 5, 3)}
    assert {shard.data.shape for shard in placed["b"].addressable_shards} == {(8,)}


def test_a_mesh_that_is_not_ours_is_refused() -> None:
    """Its axes are named, and how to make one."""
    other = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])

    with pytest.raises(InputError, match=r"axes are data; make it by mesh.make_mesh"):
        finetune.cut(jnp.ones((4, 4)), other)
    with pytest.raises(InputError, match="shard 0"):
        mesh.make_mesh(shard=0)


def test_adapters_want_their_scaling() -> None:
    """1 is not taken for it in silence (D1)."""
    with pytest.raises(InputError, match="without their scaling"):
        llama.logits(packed(), TOKENS[:, :-1], CONFIG, adapters=adapters())
