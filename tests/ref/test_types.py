"""The pytrees of the specification: what JAX sees of them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ref.types import Adapter, InputError, Layer, NestedState, QuantState


def adapter() -> Adapter:
    """Rank 2 on a weight of three rows and four columns."""
    return Adapter(jnp.ones((2, 4)), jnp.ones((3, 2)), jnp.ones(3))


def quant_state() -> QuantState:
    """A nested one, of two blocks."""
    nested = NestedState(absmax=jnp.ones(1), code=jnp.ones(256), offset=jnp.ones(()), blocksize=256)
    return QuantState(
        absmax=jnp.zeros(2, jnp.uint8), code=jnp.ones(16), nested=nested, blocksize=64, shape=(2, 64), dtype="bfloat16"
    )


def test_adapter_has_three_leaves() -> None:
    """JAX differentiates an adapter with respect to A, B and the magnitude, in this order."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(adapter())]

    assert shapes == [(2, 4), (3, 2), (3,)]


def test_adapter_is_frozen() -> None:
    """Nothing changes an adapter in place."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter().magnitude = jnp.zeros(3)


def test_gradient_of_an_adapter_is_an_adapter() -> None:
    """The derivative with respect to an adapter comes in an adapter's shape."""
    gradient = jax.grad(lambda a: jnp.sum(a.lora_A) + jnp.sum(a.magnitude))(adapter())

    assert isinstance(gradient, Adapter)


def test_quant_state_keeps_its_shape_static() -> None:
    """A jitted function may branch on a quant state's block sizes and shape."""
    count = jax.jit(lambda state: jnp.full(state.shape, 4 if state.nested.blocksize > state.blocksize else 1))(
        quant_state()
    )

    assert count.shape == (2, 64)
    assert int(count[0, 0]) == 4


def test_layer_without_bias_has_four_leaves() -> None:
    """A layer without a bias carries no array for it."""
    layer = Layer(weight=jnp.ones((3, 4)), adapter=adapter(), bias=None, scaling=0.5)

    assert len(jax.tree.leaves(layer)) == 4


def test_input_error_says_what_to_do() -> None:
    """A refused value names itself and the mend in one line."""
    error = InputError("rank 0 is below 1", hint="give 1 or more")

    assert str(error) == "rank 0 is below 1; give 1 or more"
    assert error.hint == "give 1 or more"
