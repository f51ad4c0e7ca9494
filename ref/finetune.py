"""A Llama as it is fine-tuned: weights in four bits, an adapter on every linear layer, all of it cut over a mesh.

Axes: L layers; O, I, R as in `types`. Clauses D1, D6, D12, Q4 to Q6, S1. In this order:

    frozen = quantised(read_checkpoint(...))             bytes and scales of each projection, stacked along L
    adapters = initial_adapters(frozen, key, ...)        by projection ("mlp.up_proj"), stacked along L
    frozen, adapters = cut(frozen, mesh), cut(adapters, mesh)
    llama.loss(frozen, ..., adapters=gathered(adapters, mesh))     under jit: decoded layer by layer, where the rows lie
    adapter_files.write_adapter(..., by_layer(adapters), ...)

The compiler keeps to where the arrays lie and adds what communication that takes.
"""

from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ref import dora, layers, quant_fast
from ref.checkpoint import Parameters
from ref.types import Adapter, InputError, PackedWeight

Tree = TypeVar("Tree")

PROJECTION = "_proj.weight"
"""How the names of linear weights end, inside a layer."""


def quantised(parameters: Parameters, *, blocksize: int = 64, nested: bool = True) -> Parameters:
    """Q5, Q6: the same parameters, with every linear weight of every layer in NF4, by the profile `bnb-cpu`.

    Args:
        parameters: in float32, bfloat16 or float16; embedding, norms and biases stay as they are.
        blocksize: how many weights share a scale (Q1).
        nested: whether the scales are coded as well, as QLoRA has it.

    Returns:
        Parameters that hold a `PackedWeight`, stacked along L, in place of each linear weight.

    Raises:
        QuantizationError: a weight that is not finite or of another dtype.
    """

    def coded(name: str, stacked: Array) -> Any:
        if not name.endswith(PROJECTION):
            return stacked
        parts = [PackedWeight(*quant_fast.encode_nf4(W_OI, blocksize=blocksize, nested=nested)) for W_OI in stacked]
        return jax.tree.map(lambda *each: jnp.stack(each), *parts)

    return replace(parameters, layers={name: coded(name, stacked) for name, stacked in parameters.layers.items()})


def initial_adapters(parameters: Parameters, key: Array, *, rank: int, scaling: float) -> dict[str, Adapter]:
    """D6, D12: a fresh adapter for every linear layer, by projection, stacked along L, in float32.

    A is drawn as PEFT draws it, B is zero, and the magnitude is the norm of the weight that is used: the decoded one.
    """
    adapters = {}
    for name, stacked in parameters.layers.items():
        if not name.endswith(PROJECTION):
            continue
        key, drawn = jax.random.split(key)
        keys = jax.random.split(drawn, jax.tree.leaves(stacked)[0].shape[0])
        adapters[name.removesuffix(".weight")] = jax.lax.map(
            lambda layer: _adapter(*layer, rank=rank, scaling=scaling), (keys, stacked)
        )

    return adapters


def _adapter(key: Array, weight: Array | PackedWeight, *, rank: int, scaling: float) -> Adapter:
    W_OI = quant_fast.decode(*weight) if isinstance(weight, PackedWeight) else weight
    factors = layers.initial_factors(key, W_OI.shape, rank=rank)

    return Adapter(*factors, dora.initial_magnitude(W_OI, *factors, scaling=scaling))


def cut(tree: Tree, mesh: Mesh) -> Tree:
    """S1: the same arrays, dealt over the mesh's axis `shard`: rows of weights and factors, bytes of packed ones.

    Dim 0 is cut, or the one after L where arrays are stacked. What does not divide stays whole, as NamedSharding wants
    equal shards, and so do norms, codebooks and the scales of scales. Bytes are cut in equal parts, as S1 cuts them;
    where `out` divides, that is between rows.

    Args:
        tree: parameters, adapters stacked along L, or an optimizer's state for them.
        mesh: with an axis `shard`, as `mesh.make_mesh` makes it.

    Raises:
        InputError: a mesh without that axis.
    """
    if "shard" not in mesh.shape:
        raise InputError(f"the mesh's axes are {', '.join(mesh.axis_names)}", hint="make it by mesh.make_mesh(shard=N)")
    if isinstance(tree, Parameters):
        head = None if tree.head is None else _placed(tree.head, mesh, dim=0)
        embedding, norm = _placed(tree.embedding, mesh, dim=0), _placed(tree.norm, mesh, dim=None)
        return replace(tree, embedding=embedding, norm=norm, head=head, layers=cut(tree.layers, mesh))

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, PackedWeight):
            return _placed(leaf, mesh, dim=1)
        state = jax.tree.map(lambda array: _placed(array, mesh, dim=None), leaf.state)
        return PackedWeight(
            _placed(leaf.packed, mesh, dim=1), replace(state, absmax=_placed(leaf.state.absmax, mesh, dim=1))
        )

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, PackedWeight))


def _placed(array: Array, mesh: Mesh, *, dim: int | None) -> Array:
    """The array cut along one dim; whole on every device where that dim is not there or does not divide."""
    axes = [None] * array.ndim
    if dim is not None and dim < array.ndim and array.shape[dim] % mesh.shape["shard"] == 0:
        axes[dim] = "shard"

    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))


def gathered(adapters: dict[str, Adapter], mesh: Mesh) -> dict[str, Adapter]:
    """S8: the adapters whole on every device, gathered at once rather than layer by layer; inside `jit`.

    They are small, and a collective costs the same few microseconds whatever its size. Gradients are cut again where
    they leave.
    """
    return jax.lax.with_sharding_constraint(adapters, NamedSharding(mesh, PartitionSpec()))


def by_layer(adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """C1: the adapters by the layer's Hugging Face name, no longer stacked: what adapter files hold."""
    return {
        f"model.layers.{layer}.{name}": jax.tree.map(lambda stacked, layer=layer: stacked[layer], adapter)
        for name, adapter in adapters.items()
        for layer in range(adapter.magnitude.shape[0])
    }
