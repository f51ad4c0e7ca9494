"""Sharding: layouts applied to arrays, and the forward and backward pass that works on shards.

Axes: N ranks, T tokens of one rank, I in, O out, R rank of the adapter (the legend is in `types`). Clauses S1 to S4,
S8, S11. Two parts, on the index arithmetic of `layouts`:

    arrays       shard, gather, reduce_mean                                                    S1, S2, S3
    collectives  `shard_map` over a mesh of one axis: gather, compute, reduce, by layer        S3, S4, S8, S11
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Num

from ref.dora import direction, forward, forward_with_ratio, ratio, weight_norm
from ref.layouts import FlatLayout, fsdp2_row_range, up_to
from ref.training import checkpointed
from ref.types import Adapter, InputError, Layer

AXIS: Final = "rank"
"""The name of the mesh's one axis, over which parameters and batches are both split."""

FILLER: Final = 42
"""What torch writes between aligned members of a flat parameter, so that a leak shows; it is never read."""


# Arrays: the layouts applied.


def shard(array_D: Num[Array, "D *K"], *, world_size: int, rank: int) -> Num[Array, "d *K"]:
    """S1: the rows that one rank holds."""
    return array_D[fsdp2_row_range(array_D.shape[0], world_size=world_size, rank=rank)]


def gather(shards: Sequence[Num[Array, "_ *K"]]) -> Num[Array, "D *K"]:
    """S1: the whole parameter from all ranks' rows, in the order of the ranks."""
    return jnp.concatenate(shards)


def flatten(arrays: Mapping[str, Num[Array, "..."]], layout: FlatLayout) -> Num[Array, " flat"]:
    """S2: the flat parameter, all of it; what lies between members and behind them is `FILLER`."""
    dtype = arrays[layout.members[0].name].dtype
    flat = jnp.full(layout.size, FILLER, dtype)
    for member in layout.members:
        flat = flat.at[member.start : member.start + member.size].set(arrays[member.name].reshape(-1))

    return flat


def unflatten(flat: Num[Array, " flat"], layout: FlatLayout) -> dict[str, Num[Array, "..."]]:
    """S2: the members back from the flat parameter, each in its shape."""
    return {
        member.name: flat[member.start : member.start + member.size].reshape(member.shape) for member in layout.members
    }


def reduce_mean(gradients: Sequence[Float[Array, "*K"]]) -> Float[Array, "*K"]:
    """S3: the gradient that is then sharded: the mean over ranks of each rank's whole gradient.

    g = (g_0 + g_1 + ... + g_{N-1}) / N
    """
    return sum(gradients[1:], start=gradients[0]) / len(gradients)


def local_weight_norm(
    W_OI: Float[Array, "o I"], lora_A: Float[Array, "R I"], lora_B: Float[Array, "o R"], *, scaling: float
) -> Float[Array, " o"]:
    """S4: the norms of the output rows that a rank holds, from its own rows of W and B and the whole of A.

    Rows don't meet in D3, so this is `weight_norm` of fewer rows; no row of W moves.
    """
    V_OI = direction(W_OI, lora_A, lora_B, scaling=scaling)

    return weight_norm(V_OI)


# Collectives: one rank's program, under `shard_map`.


def stack(x_TI: Float[Array, "T I"], layers: Sequence[Layer], *, relu: bool = False) -> Float[Array, "T O"]:
    """The unsharded form: layers one after another, with an optional ReLU between them (derivative 0 at 0)."""
    for position, layer in enumerate(layers):
        x_TI = jax.nn.relu(x_TI) if relu and position else x_TI
        x_TI = forward(x_TI, layer.weight, layer.adapter, scaling=layer.scaling, bias_O=layer.bias)

    return x_TI


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_rows(shard_D: Float[Array, "d *K"], rows: int) -> Float[Array, "D *K"]:
    """S3, S11: gather a trained parameter; its gradient comes back as the mean over ranks, cut into shards.

    forward   all_gather,       then the padding behind `rows` is dropped
    backward  reduce_scatter,   then division by the number of ranks
    """
    return lax.all_gather(shard_D, AXIS, tiled=True)[:rows]


def _gather_rows_forward(shard_D: Float[Array, "d *K"], rows: int) -> tuple[Float[Array, "D *K"], None]:
    return gather_rows(shard_D, rows), None


def _gather_rows_backward(_rows: int, _: None, cotangent_D: Float[Array, "D *K"]) -> tuple[Float[Array, "d *K"]]:
    world_size = lax.axis_size(AXIS)
    summed_D = lax.psum_scatter(_pad_rows(cotangent_D, world_size), AXIS, tiled=True)

    return (summed_D / world_size,)


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def unit_forward(x_TI: Float[Array, "T I"], held: Layer, *, out: int, rank: int) -> Float[Array, "T O"]:
    """S8: one layer on one rank: everything that is read is gathered here, inside the layer's own forward.

    `held` is the layer with this rank's rows (of W, b, B, m along out, of A along its rank), zero-padded to equal
    heights; `out` and `rank` are the whole heights. Norms are taken locally (S4) and gathered, constant as D5 has them.
    """
    A_RI = gather_rows(held.adapter.lora_A, rank)
    B_OR = gather_rows(held.adapter.lora_B, out)
    m_O = gather_rows(held.adapter.magnitude, out)
    W_OI = lax.all_gather(held.weight, AXIS, tiled=True)[:out]
    b_O = None if held.bias is None else lax.all_gather(held.bias, AXIS, tiled=True)[:out]

    n_o = local_weight_norm(held.weight, A_RI, held.adapter.lora_B, scaling=held.scaling)
    n_O = lax.all_gather(lax.stop_gradient(n_o), AXIS, tiled=True)[:out]
    c_O = ratio(m_O, n_O)

    return forward_with_ratio(x_TI, W_OI, Adapter(A_RI, B_OR, m_O), c_O=c_O, scaling=held.scaling, bias_O=b_O)


def sharded_gradients(
    x_NTI: Float[Array, "N T I"], layers: Sequence[Layer], *, G_NTO: Float[Array, "N T O"], relu: bool = False
) -> tuple[Float[Array, "N T O"], list[list[Adapter]]]:
    """S1, S3, S4: FSDP's forward and backward for a stack of layers, one device a rank.

    Rank k computes `y_k = stack(x_k)` and backpropagates `sum(G_k * y_k)`; gradients are averaged over ranks. For the
    gradient of the sum over all ranks, scale `G_NTO` by N. Ranks with fewer tokens pad with rows whose x and G are 0.

    Returns:
        Every rank's output, and `gradients[rank][layer]`: an Adapter that holds the rank's rows of dA, dB and dm.

    Raises:
        InputError: where there are fewer devices than ranks.
    """
    world_size = x_NTI.shape[0]
    mesh = _mesh(world_size)
    place = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(AXIS)))
    heights = tuple(layer.adapter.lora_B.shape for layer in layers)
    held = jax.tree.map(lambda array: place(_pad_rows(array, world_size)), list(layers))

    y_NTO, gradients = _on_mesh(place(x_NTI), place(G_NTO), held, mesh=mesh, heights=heights, relu=relu)
    pairs = list(zip(jax.device_get(gradients), layers, strict=True))

    return jnp.asarray(jax.device_get(y_NTO)), [
        [_held_by(rank, padded, layer.adapter, world_size=world_size) for padded, layer in pairs]
        for rank in range(world_size)
    ]


@partial(jax.jit, static_argnames=("mesh", "heights", "relu"))
def _on_mesh(
    x_NTI: Float[Array, "N T I"],
    G_NTO: Float[Array, "N T O"],
    held: list[Layer],
    *,
    mesh: Mesh,
    heights: tuple[tuple[int, int], ...],
    relu: bool,
) -> tuple[Float[Array, "N T O"], list[Adapter]]:
    """Every rank runs `_rank_step` on its slice of dim 0 of everything."""
    split = PartitionSpec(AXIS)
    step = partial(_rank_step, heights=heights, relu=relu)

    return jax.shard_map(step, mesh=mesh, in_specs=(split, split, split), out_specs=(split, split))(x_NTI, G_NTO, held)


def _rank_step(
    x_1TI: Float[Array, "1 T I"],
    G_1TO: Float[Array, "1 T O"],
    held: list[Layer],
    *,
    heights: tuple[tuple[int, int], ...],
    relu: bool,
) -> tuple[Float[Array, "1 T O"], list[Adapter]]:
    """One rank's forward and backward; recomputation (T5) gathers again for the backward, and keeps nothing whole."""

    def forward_on_shards(adapters: list[Adapter]) -> Float[Array, "T O"]:
        x_TI = x_1TI[0]
        for position, (layer, adapter, (out, rank)) in enumerate(zip(held, adapters, heights, strict=True)):
            x_TI = jax.nn.relu(x_TI) if relu and position else x_TI
            unit = checkpointed(partial(unit_forward, out=out, rank=rank))
            x_TI = unit(x_TI, replace(layer, adapter=adapter))
        return x_TI

    y_TO, pull_back = jax.vjp(forward_on_shards, [layer.adapter for layer in held])
    (gradients,) = pull_back(G_1TO[0])

    return y_TO[None], gradients


def _held_by(rank: int, padded: Adapter, like: Adapter, *, world_size: int) -> Adapter:
    """S1: one rank's rows of an adapter's gradient, the padding, which lies behind all rows, left out."""
    rows = partial(fsdp2_row_range, world_size=world_size, rank=rank)

    return jax.tree.map(lambda array, whole: jnp.asarray(array[rows(whole.shape[0])]), padded, like)


def _pad_rows(array_D: Num[Array, "D *K"], world_size: int) -> Num[Array, "P *K"]:
    """Zero rows behind, up to a multiple of the world size, so that all ranks hold equal heights."""
    behind = up_to(array_D.shape[0], world_size) - array_D.shape[0]

    return jnp.pad(array_D, [(0, behind)] + [(0, 0)] * (array_D.ndim - 1))


def _mesh(world_size: int) -> Mesh:
    devices = jax.devices()
    if len(devices) < world_size:
        raise InputError(
            f"{world_size} ranks want as many devices, and there are {len(devices)}",
            hint="set jax_num_cpu_devices before JAX's first use",
        )

    return jax.make_mesh((world_size,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:world_size])
