"""Clauses S9 and S10: hybrid, tensor-parallel and jitted forms give the unsharded gradients, to the bit on lattices."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import PartitionSpec

from ref import dora, fsdp, mesh, tensor_parallel
from ref.types import Adapter, InputError, Layer

MESHES = {
    "hybrid 2x2": {"replicate": 2, "shard": 2},
    "tensor 2": {"tensor": 2},
    "fsdp 2 x tensor 2": {"shard": 2, "tensor": 2},
    "fsdp 3 x tensor 2": {"shard": 3, "tensor": 2},
    "all three": {"replicate": 2, "shard": 2, "tensor": 2},
}
CUTS = {"column, row": ("column", "row"), "row, column": ("row", "column"), "column, column": ("column", "column")}
ON_MESHES = pytest.mark.parametrize("shape", MESHES)
WITH_CUTS = pytest.mark.parametrize("cuts", CUTS)
FIELDS = pytest.mark.parametrize("field", ["lora_A", "lora_B", "magnitude"])


def lattice_layer(out: int, width: int, rank: int, *, bias: bool = True, norm: int = 2) -> Layer:
    """Rows of V with norm^2 entries of size 1, so that every norm is `norm`; everything else small integers."""
    random = np.random.default_rng([out, width, rank])
    V_OI = np.zeros((out, width))
    for row in V_OI:
        row[random.permutation(width)[: norm**2]] = random.choice([-1, 1], norm**2)
    A_RI, B_OR = random.choice([-1, 1], (rank, width)), random.choice([-1, 1], (out, rank))
    m_O, b_O = random.choice([1, 2, 4], out), random.integers(-2, 3, out)
    arrays = (jnp.asarray(x.astype(np.float32)) for x in (V_OI - B_OR @ A_RI / 2, A_RI, B_OR, m_O, b_O))
    W_OI, A_RI, B_OR, m_O, b_O = arrays
    return Layer(W_OI, Adapter(A_RI, B_OR, m_O), b_O if bias else None, scaling=0.5)


LAYERS = [lattice_layer(12, 8, 3), lattice_layer(4, 12, 2, bias=False)]


def batches(ranks: int) -> tuple[Array, Array]:
    """Small integer inputs and cotangents, three tokens a data rank."""
    random = np.random.default_rng(ranks)
    return tuple(jnp.asarray(random.integers(-2, 3, (ranks, 3, width)), jnp.float32) for width in (8, 4))


def loss(adapters: list[Adapter], layers: list[Layer], x_NTI: Array, G_NTO: Array) -> Array:
    """The sum over all tokens, written for one device."""
    adapted = [replace(layer, adapter=adapter) for layer, adapter in zip(layers, adapters, strict=True)]
    y_TO = fsdp.stack(x_NTI.reshape(-1, x_NTI.shape[2]), adapted, relu=True)
    return jnp.sum(G_NTO.reshape(y_TO.shape) * y_TO)


@cache
def both(shape: str, cuts: str) -> tuple[list[Adapter], list[Adapter], Array]:
    """The unsharded gradients, those from the mesh, and its outputs."""
    sizes = MESHES[shape]
    ranks = sizes.get("replicate", 1) * sizes.get("shard", 1)
    x_NTI, G_NTO = batches(ranks)
    want = jax.grad(loss)([layer.adapter for layer in LAYERS], LAYERS, x_NTI, G_NTO)
    y_NTO, got = mesh.mesh_gradients(
        x_NTI, LAYERS, G_NTO=ranks * G_NTO, mesh=mesh.make_mesh(**sizes), cuts=CUTS[cuts], relu=True
    )
    return want, got, y_NTO


@FIELDS
@ON_MESHES
def test_s9_gradients_equal_the_unsharded_ones(shape: str, field: str) -> None:
    """On every mesh, hybrid ones and FSDP x TP among them, each gradient is the unsharded one, to the bit."""
    want, got, _ = both(shape, "column, row")

    assert [getattr(part, field).tolist() for part in got] == [getattr(whole, field).tolist() for whole in want]
    assert all(bool(jnp.any(getattr(whole, field) != 0)) for whole in want)


@FIELDS
@WITH_CUTS
def test_s10_either_cut_equals_the_unsharded_layer(cuts: str, field: str) -> None:
    """Column and row parallel layers, in any order, give the unsharded gradients, to the bit."""
    want, got, _ = both("fsdp 2 x tensor 2", cuts)

    assert [getattr(part, field).tolist() for part in got] == [getattr(whole, field).tolist() for whole in want]


@ON_MESHES
def test_s10_outputs_equal_the_unsharded_ones(shape: str) -> None:
    """Every data rank's output is that of the unsharded stack, to the bit."""
    _, _, y_NTO = both(shape, "column, row")
    x_NTI, _ = batches(y_NTO.shape[0])

    assert y_NTO.reshape(-1, 4).tolist() == fsdp.stack(x_NTI.reshape(-1, 8), LAYERS, relu=True).tolist()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20], ids=str)
def test_s10_the_norm_of_cut_rows_keeps_its_range(size: float) -> None:
    """Squares that would leave float32 are summed over the ranks all the same, and one root is taken."""
    width = 4
    held = Layer(
        jnp.full((3, width), size, jnp.float32).at[2].set(0),
        Adapter(jnp.zeros((1, width), jnp.float32), jnp.zeros((3, 1), jnp.float32), jnp.ones(3, jnp.float32)),
        None,
        scaling=1.0,
    )
    spec = mesh.placements(held, cut="row")
    on_mesh = jax.shard_map(
        tensor_parallel.norm_of_cut_rows,
        mesh=mesh.make_mesh(tensor=2),
        in_specs=(spec,),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    n_O = on_mesh(held)

    assert n_O.tolist() == dora.weight_norm(held.weight).tolist()
    assert n_O.tolist()[2] == 0


@FIELDS
@ON_MESHES
def test_s9_jit_with_named_shardings_equals_the_unsharded_program(shape: str, field: str) -> None:
    """The unsharded program under jit, its arrays laid out on the mesh, gives the same gradients, to the bit."""
    want, _, _ = both(shape, "column, row")

    got = jitted(shape)

    assert [getattr(part, field).tolist() for part in got] == [getattr(whole, field).tolist() for whole in want]


@cache
def jitted(shape: str) -> list[Adapter]:
    """Gradients of the unsharded program, laid out like the parameters."""
    sizes = MESHES[shape]
    x_NTI, G_NTO = batches(sizes.get("replicate", 1) * sizes.get("shard", 1))
    on = mesh.make_mesh(**sizes)
    layers = [mesh.placed(layer, mesh=on, cut=cut) for layer, cut in zip(LAYERS, CUTS["column, row"], strict=True)]
    adapters = [layer.adapter for layer in layers]
    return jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda a: a.sharding, adapters))(
        adapters, layers, x_NTI, G_NTO
    )


def test_s10_placed_arrays_are_cut() -> None:
    """A placed weight lies in as many parts as its axes have ranks, not whole on each."""
    layer = mesh.placed(LAYERS[0], mesh=mesh.make_mesh(shard=2, tensor=2), cut="column")

    assert {shard.data.shape for shard in layer.weight.addressable_shards} == {(3, 8)}
    assert {shard.data.shape for shard in layer.adapter.lora_A.addressable_shards} == {(3, 8)}  # 3 rows, 2 ranks


@pytest.mark.parametrize(
    ("sizes", "cuts", "said"),
    [
        ({"shard": 3}, ("column", "row"), "2 batches for 3"),
        ({"shard": 2}, ("column",), "1 cuts for 2"),
        ({"shard": 2, "tensor": 3}, ("row", "column"), "8 features"),
    ],
    ids=["batches", "cuts", "features"],
)
def test_s10_refuses_what_does_not_fit(sizes: dict[str, int], cuts: tuple[tensor_parallel.Cut, ...], said: str) -> None:
    """Batches, cuts or features that the mesh cannot deal are named."""
    x_NTI, G_NTO = batches(2)

    with pytest.raises(InputError, match=said):
        mesh.mesh_gradients(x_NTI, LAYERS, G_NTO=G_NTO, mesh=mesh.make_mesh(**sizes), cuts=cuts)


@pytest.mark.parametrize("axis", ["replicate", "shard", "tensor"])
def test_s9_an_axis_that_is_not_asked_for_has_one_rank(axis: str) -> None:
    """A mesh of three shards is no mesh of replicas or tensor ranks."""
    sizes = {"replicate": 1, "shard": 1, "tensor": 1, axis: 3}

    assert dict(mesh.make_mesh(**{axis: 3}).shape) == sizes


def test_s9_a_mesh_of_too_many_ranks_is_refused() -> None:
    """More ranks than devices are refused, with how to have more."""
    with pytest.raises(InputError, match="24 ranks"):
        mesh.make_mesh(replicate=2, shard=4, tensor=3)
