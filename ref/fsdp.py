"""Sharding: which rank holds what, as index arithmetic, and the forward and backward pass that works on shards.

Axes: N ranks, T tokens of one rank, I in, O out, R rank of the adapter (the legend is in `types`). Clauses S1 to S4, S6
to S8, S11. Three parts, in the order in which they build on each other:

    layouts      plain integers, O(1) or O(members) a call: 16,384 ranks cost what two do      S1, S2, S6, S7
    arrays       the same layouts applied: shard, gather, reduce_mean                          S1, S2, S3
    collectives  `shard_map` over a mesh of one axis: gather, compute, reduce, by layer        S3, S4, S8, S11
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Num

from ref.dora import direction, forward, forward_with_ratio, ratio, weight_norm
from ref.types import Adapter, InputError, Layer

AXIS: Final = "rank"
"""The name of the mesh's one axis, over which parameters and batches are both split."""

FILLER: Final = 42
"""What torch writes between aligned members of a flat parameter, so that a leak shows; it is never read."""

Strategy: TypeAlias = Literal["fsdp1", "fsdp1-orig", "fsdp2"]
"""torch's FullyShardedDataParallel, the same with `use_orig_params=True`, and `fully_shard`."""


# Layouts: plain integers.


def fsdp2_row_range(dim0: int, *, world_size: int, rank: int) -> slice:
    """S1: the rows of a parameter that one rank holds: dim 0 in steps of `ceil(dim0 / world)`.

    The last ranks may hold a short slice or an empty one: a parameter of one row lives on rank 0 alone.
    """
    _check_rank(rank, world_size)
    step = -(-dim0 // world_size)

    return slice(min(rank * step, dim0), min((rank + 1) * step, dim0))


def packed_shape(elements: int, *, itemsize: int) -> tuple[int, int]:
    """S1, Q3: the shape of four-bit storage, `(ceil(bytes / itemsize), 1)` with two elements a byte.

    Its dim 0 knows nothing of the weight's rows or blocks: S1 cuts both.
    """
    nbytes = -(-elements // 2)

    return (-(-nbytes // itemsize), 1)


@dataclass(frozen=True)
class FlatMember:
    """S2: one parameter's place in a flat parameter."""

    name: str
    """The parameter's name."""

    shape: tuple[int, ...]
    """Its shape before flattening, which is row-major."""

    start: int
    """The index of its first element in the flat parameter."""

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """S2: a flat parameter: members in order, filler between them, a tail up to a multiple of the world size."""

    members: tuple[FlatMember, ...]
    """The parameters in registration order."""

    world_size: int
    """The number of ranks, each of which owns `size / world_size` consecutive elements."""

    size: int
    """The number of elements, filler and tail included."""

    def rank_range(self, rank: int) -> slice:
        """S2: the elements of the flat parameter that one rank owns."""
        _check_rank(rank, self.world_size)
        step = self.size // self.world_size

        return slice(rank * step, (rank + 1) * step)

    def shard(self, rank: int) -> list[tuple[str, slice]]:
        """S2: the part of each member, in its own row-major flattening, that one rank owns; empty slices included."""
        owned = self.rank_range(rank)

        return [
            (member.name, slice(*(min(max(end - member.start, 0), member.size) for end in (owned.start, owned.stop))))
            for member in self.members
        ]


def flat_layout(
    members: Sequence[tuple[str, tuple[int, ...]]], *, world_size: int, alignment: int | None = None
) -> FlatLayout:
    """S2: lay parameters out in one flat parameter.

    Args:
        members: name and shape of each parameter, in registration order.
        world_size: the number of ranks.
        alignment: each member starts at a multiple of this many elements: `16 // itemsize` of the compute dtype with
            `use_orig_params=True`, None without.
    """
    _check_rank(0, world_size)
    placed: list[FlatMember] = []
    end = 0
    for name, shape in members:
        member = FlatMember(name, shape, start=_up_to(end, alignment or 1))
        placed.append(member)
        end = member.start + member.size

    return FlatLayout(tuple(placed), world_size, size=_up_to(end, world_size))


def wire_dtype(storage: str, *, param_dtype: str | None) -> str:
    """S6: the dtype in which packed four-bit bytes travel: always the one that they are stored in.

    FSDP casts floating parameters to `param_dtype` and leaves integers alone; packed bytes that only pretend to be
    floating numbers would become others.

    Raises:
        InputError: where `storage` is floating and `param_dtype` is another dtype.
    """
    floating = jnp.issubdtype(jnp.dtype(storage), jnp.floating)
    if floating and param_dtype is not None and jnp.dtype(param_dtype) != jnp.dtype(storage):
        raise InputError(
            f"param_dtype {param_dtype} would cast packed bytes stored as {storage}",
            hint="leave param_dtype unset for this unit, or store the bytes in that dtype",
        )

    return storage


@dataclass(frozen=True)
class UnitMember:
    """S7: what decides whether a parameter may share a unit with another."""

    name: str
    """The parameter's name."""

    dtype: str
    """The dtype that it is stored in."""

    trainable: bool
    """Whether autograd gives it a gradient."""


def check_unit(members: Sequence[UnitMember], *, strategy: Strategy) -> None:
    """S7: one unit's parameters are gathered and reduced together, and have to be alike for it.

    A flat parameter (FSDP1) has one dtype, which is no integer one, and one `trainable` unless `use_orig_params`; FSDP2
    wants one dtype among the trainable parameters.

    Raises:
        InputError: where the members break the rule of `strategy`.
    """
    bound = [member for member in members if member.trainable or strategy != "fsdp2"]
    dtypes = sorted({member.dtype for member in bound})
    integers = [member.name for member in bound if not jnp.issubdtype(jnp.dtype(member.dtype), jnp.inexact)]

    if len(dtypes) > 1:
        raise InputError(f"one unit mixes dtypes {', '.join(dtypes)}", hint="give the adapter a unit of its own")
    if integers and strategy != "fsdp2":
        raise InputError(
            f"{integers[0]} has an integer dtype", hint="store the bytes in a floating dtype, or use fsdp2"
        )
    if strategy == "fsdp1" and len({member.trainable for member in members}) > 1:
        raise InputError("one unit mixes trainable and frozen", hint="give the adapter a unit of its own")


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
    """One rank's forward and backward; `jax.checkpoint` gathers again for the backward instead of keeping the whole."""

    def forward_on_shards(adapters: list[Adapter]) -> Float[Array, "T O"]:
        x_TI = x_1TI[0]
        for position, (layer, adapter, (out, rank)) in enumerate(zip(held, adapters, heights, strict=True)):
            x_TI = jax.nn.relu(x_TI) if relu and position else x_TI
            unit = jax.checkpoint(partial(unit_forward, out=out, rank=rank))
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
    behind = _up_to(array_D.shape[0], world_size) - array_D.shape[0]

    return jnp.pad(array_D, [(0, behind)] + [(0, 0)] * (array_D.ndim - 1))


def _mesh(world_size: int) -> Mesh:
    devices = jax.devices()
    if len(devices) < world_size:
        raise InputError(
            f"{world_size} ranks want as many devices, and there are {len(devices)}",
            hint="set jax_num_cpu_devices before JAX's first use",
        )

    return jax.make_mesh((world_size,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:world_size])


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of a world of {world_size}", hint="ranks count from 0 to world_size - 1")


def _up_to(count: int, multiple: int) -> int:
    """The least multiple that is no less than the count."""
    return -(-count // multiple) * multiple
