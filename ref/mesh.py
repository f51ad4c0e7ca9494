"""Sharding over a mesh of three axes: FSDP, hybrid, tensor-parallel, and any two or three of them at once.

Axes: N data-parallel ranks, T tokens of one, I in, O out, R rank of the adapter. Clauses S9 and S10, over S3, S4,
S8. A mesh has the axes

    replicate   whole copies of what `shard` cuts; gradients are averaged                      S9
    shard       dim 0 of every parameter, gathered in its layer's forward, as FSDP does        S1, S8
    tensor      the output rows of a column-parallel layer, the input features of a row-parallel one      S10

and `tensor_parallel` has one layer's program along the last. `placed` is the other way to write the same: the unsharded
program under `jit`, with arrays that carry a NamedSharding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Num

from ref.layouts import fsdp2_row_range, up_to
from ref.tensor_parallel import TENSOR, Cut, all_features, column_parallel, own_features, row_parallel
from ref.training import checkpointed
from ref.types import Adapter, InputError, Layer

REPLICATE: Final = "replicate"
"""S9: the axis along which ranks hold the same shards."""

SHARD: Final = "shard"
"""S1: the axis along which dim 0 of every parameter is cut."""


def make_mesh(*, replicate: int = 1, shard: int = 1, tensor: int = 1) -> Mesh:
    """S9, S10: a mesh of the three axes, `tensor` the innermost, as its ranks talk most.

    Raises:
        InputError: where there are fewer devices than ranks, or an axis has no rank.
    """
    count, devices = replicate * shard * tensor, jax.devices()
    if min(replicate, shard, tensor) < 1:
        raise InputError(f"replicate {replicate}, shard {shard}, tensor {tensor}", hint="give each axis 1 or more")
    if len(devices) < count:
        raise InputError(
            f"{count} ranks want as many devices, and there are {len(devices)}",
            hint="set jax_num_cpu_devices before JAX's first use",
        )
    axes = (REPLICATE, SHARD, TENSOR)

    return jax.make_mesh((replicate, shard, tensor), axes, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


# Where each parameter lies.


def placements(layer: Layer, *, cut: Cut) -> Layer:
    """S1, S10: a layer of PartitionSpecs in place of its arrays; what the tensor axis cuts, `shard` cuts again."""
    of = {leaf: placement_of(leaf, cut=cut) for leaf in ("weight", "lora_A", "lora_B", "magnitude", "bias")}
    bias = None if layer.bias is None else of["bias"]

    return Layer(of["weight"], Adapter(of["lora_A"], of["lora_B"], of["magnitude"]), bias, scaling=layer.scaling)


def placement_of(leaf: str, *, cut: Cut) -> PartitionSpec:
    """S1, S10: where a layer's `weight`, `lora_A`, `lora_B`, `magnitude` or `bias` lies.

    Packed bytes of a column-parallel weight are (n, 1), of a row-parallel one (O, n / O), and lie as the weight does.
    """
    if cut == "row" and leaf in {"weight", "lora_A"}:
        return PartitionSpec(SHARD, TENSOR)

    return PartitionSpec((TENSOR, SHARD)) if cut == "column" and leaf != "lora_A" else PartitionSpec(SHARD)


def rank_part(
    shape: tuple[int, ...], placement: PartitionSpec, *, tensor: tuple[int, int], shard: tuple[int, int]
) -> tuple[slice, ...]:
    """S1, S10: which part of an array a rank has; `tensor` and `shard` are (its place on the axis, the axis' size).

    The tensor axis cuts evenly; of the rows that it leaves each of the `shard` ranks has ceil(rows / size), later ones
    fewer or none.
    """
    part = [slice(0, size) for size in shape]
    for dim, axes in enumerate(placement):
        if axes in (TENSOR, (TENSOR, SHARD)):
            width = shape[dim] // tensor[1]
            part[dim] = slice(tensor[0] * width, (tensor[0] + 1) * width)
    own = fsdp2_row_range(part[0].stop - part[0].start, world_size=shard[1], rank=shard[0])

    return slice(part[0].start + own.start, part[0].start + own.stop), *part[1:]


# Gathering, and what it brings about in the backward pass.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_rows(shard_D: Float[Array, "d *K"], rows: int) -> Float[Array, "D *K"]:
    """S9, S11: gather a trained parameter within a replica; its gradient returns as the mean over all data ranks.

    forward   all_gather over `shard`
    backward  reduce_scatter over `shard`, mean over `replicate`, division by the size of `shard`
    """
    return lax.all_gather(shard_D, SHARD, tiled=True)[:rows]


def _gather_rows_forward(shard_D: Float[Array, "d *K"], rows: int) -> tuple[Float[Array, "D *K"], None]:
    return gather_rows(shard_D, rows), None


def _gather_rows_backward(_rows: int, _: None, cotangent_D: Float[Array, "D *K"]) -> tuple[Float[Array, "d *K"]]:
    world_size = lax.axis_size(SHARD)
    summed_D = lax.psum_scatter(_pad_rows(cotangent_D, world_size), SHARD, tiled=True)

    return (lax.pmean(summed_D, REPLICATE) / world_size,)


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def gather_unit(held: Layer, *, heights: Layer) -> Layer:
    """S8: one tensor rank's whole part of a layer, from the rows that each of the `shard` ranks holds.

    `heights` holds in each array's place how many of its rows are no padding. What is frozen has no gradient to reduce.
    """
    frozen = jax.tree.map(
        lambda shard_D, rows: lax.all_gather(shard_D, SHARD, tiled=True)[:rows],
        (held.weight, held.bias),
        (heights.weight, heights.bias),
    )
    adapter = jax.tree.map(gather_rows, held.adapter, heights.adapter)

    return Layer(frozen[0], adapter, frozen[1], scaling=held.scaling)


# A stack of layers on the whole mesh.


def stack(
    x_TI: Float[Array, "T I"], layers: Sequence[Layer], *, cuts: Sequence[Cut], heights: Sequence[Layer], relu: bool
) -> Float[Array, "T O"]:
    """S8, S10: one rank's program; features are gathered or sliced only where a layer wants the other form.

    Recomputation (T5) gathers parameters again for the backward pass, and keeps nothing whole.
    """
    features_cut = False
    for position, (held, cut, rows) in enumerate(zip(layers, cuts, heights, strict=True)):
        x_TI = jax.nn.relu(x_TI) if relu and position else x_TI
        if features_cut != (cut == "row"):
            x_TI = own_features(x_TI) if cut == "row" else all_features(x_TI)
        x_TI = checkpointed(partial(_unit, cut=cut, heights=rows))(x_TI, held)
        features_cut = cut == "column"

    return all_features(x_TI) if features_cut else x_TI


def _unit(x_TI: Float[Array, "T I"], held: Layer, *, cut: Cut, heights: Layer) -> Float[Array, "T O"]:
    whole = gather_unit(held, heights=heights)

    return column_parallel(x_TI, whole) if cut == "column" else row_parallel(x_TI, whole)


def mesh_gradients(
    x_NTI: Float[Array, "N T I"],
    layers: Sequence[Layer],
    *,
    G_NTO: Float[Array, "N T O"],
    mesh: Mesh,
    cuts: Sequence[Cut],
    relu: bool = False,
) -> tuple[Float[Array, "N T O"], list[Adapter]]:
    """S3, S9, S10: forward and backward of a stack of layers; N is the number of data ranks, `replicate` times `shard`.

    Data rank k computes `y_k = stack(x_k)` and backpropagates `sum(G_k * y_k)`; gradients are averaged over data ranks.

    Returns:
        Every data rank's output, and each layer's gradient put together from the shards of all ranks.

    Raises:
        InputError: where N is no such product, the features that `cuts` names don't divide by the size of `tensor`, or
            there is not one cut a layer.
    """
    y_NTO, gradients = sharded_gradients(x_NTI, layers, G_NTO=G_NTO, mesh=mesh, cuts=cuts, relu=relu)
    whole = [pieces(layer, cut, mesh) for layer, cut in zip(layers, cuts, strict=True)]

    return y_NTO, [
        jax.tree.map(lambda piece, array: piece.unpadded(array), of_layer.adapter, gradient, is_leaf=is_piece)
        for of_layer, gradient in zip(whole, gradients, strict=True)
    ]


def sharded_gradients(
    x_NTI: Float[Array, "N T I"],
    layers: Sequence[Layer],
    *,
    G_NTO: Float[Array, "N T O"],
    mesh: Mesh,
    cuts: Sequence[Cut],
    relu: bool = False,
) -> tuple[Float[Array, "N T O"], list[Adapter]]:
    """S9, S10: the same, with each gradient left where it lies, padded: a rank holds what its device holds.

    Raises:
        InputError: as `mesh_gradients` does.
    """
    _require_fits(x_NTI.shape[0], layers, mesh=mesh, cuts=cuts)
    whole = [pieces(layer, cut, mesh) for layer, cut in zip(layers, cuts, strict=True)]
    padded = [jax.tree.map(lambda piece: piece.padded, of_layer, is_leaf=is_piece) for of_layer in whole]
    heights = [jax.tree.map(lambda piece: piece.rows, of_layer, is_leaf=is_piece) for of_layer in whole]
    specs = [placements(layer, cut=cut) for layer, cut in zip(layers, cuts, strict=True)]
    batch = PartitionSpec((REPLICATE, SHARD))

    def rank_step(x_1TI: Array, G_1TO: Array, held: list[Layer]) -> tuple[Array, list[Adapter]]:
        def outputs(adapters: list[Adapter]) -> Array:
            adapted = [replace(layer, adapter=adapter) for layer, adapter in zip(held, adapters, strict=True)]
            return stack(x_1TI[0], adapted, cuts=cuts, heights=heights, relu=relu)

        y_TO, pull_back = jax.vjp(outputs, [layer.adapter for layer in held])
        return y_TO[None], pull_back(G_1TO[0])[0]

    # check_vma=False: the backward's collectives are those written above, and JAX adds none of its own
    run = jax.shard_map(
        rank_step,
        mesh=mesh,
        in_specs=(batch, batch, specs),
        out_specs=(batch, [spec.adapter for spec in specs]),
        check_vma=False,
    )
    return jax.jit(run)(x_NTI, G_NTO, padded)


@dataclass(frozen=True)
class Piece:
    """S1: a parameter with each tensor rank's rows padded to a multiple of the size of `shard`."""

    padded: Num[Array, "P *K"]
    """The rows and, behind each tensor rank's, the zeros."""

    rows: int
    """How many of one tensor rank's rows are no zeros."""

    parts: int
    """Among how many tensor ranks the rows are dealt: 1 where `tensor` cuts another dim or none."""

    def unpadded(self, array: Num[Array, "P *K"]) -> Num[Array, "D *K"]:
        """The rows alone, of an array laid out like this one."""
        by_part = array.reshape(self.parts, -1, *array.shape[1:])[:, : self.rows]
        return by_part.reshape(-1, *array.shape[1:])

    def whole_rows(self, padded_rows: slice) -> slice:
        """Which rows of the whole a rank's padded rows hold; the zeros behind are not counted, and may be all."""
        height = self.padded.shape[0] // self.parts
        part, start = divmod(padded_rows.start, height)
        stop = start + padded_rows.stop - padded_rows.start

        return slice(part * self.rows + min(start, self.rows), part * self.rows + min(stop, self.rows))


def is_piece(value: object) -> bool:
    """Where `jax.tree.map` stops in a layer of pieces."""
    return isinstance(value, Piece)


def pieces(layer: Layer, cut: Cut, mesh: Mesh) -> Layer:
    """A layer of pieces in place of its arrays."""

    def piece(array: Num[Array, "D *K"], spec: PartitionSpec) -> Piece:
        parts = mesh.shape[TENSOR] if spec[0] == (TENSOR, SHARD) else 1
        by_part = jnp.split(array, parts)
        padded = jnp.concatenate([_pad_rows(part, mesh.shape[SHARD]) for part in by_part])
        return Piece(padded, rows=by_part[0].shape[0], parts=parts)

    return jax.tree.map(piece, layer, placements(layer, cut=cut))


def _require_fits(batches: int, layers: Sequence[Layer], *, mesh: Mesh, cuts: Sequence[Cut]) -> None:
    data_ranks, tensor_ranks = mesh.shape[REPLICATE] * mesh.shape[SHARD], mesh.shape[TENSOR]
    if batches != data_ranks:
        raise InputError(f"{batches} batches for {data_ranks} data ranks", hint="give one a rank of replicate x shard")
    if len(cuts) != len(layers):
        raise InputError(f"{len(cuts)} cuts for {len(layers)} layers", hint="give 'column' or 'row' for each")
    for layer, cut in zip(layers, cuts, strict=True):
        features = layer.weight.shape[0 if cut == "column" else 1]
        if features % tensor_ranks:
            raise InputError(
                f"{features} features do not divide among {tensor_ranks} tensor ranks",
                hint=f"pad the weight {layer.weight.shape}, or cut it the other way",
            )


def _pad_rows(array_D: Num[Array, "D *K"], world_size: int) -> Num[Array, "P *K"]:
    """Zero rows behind, up to a multiple of the world size."""
    behind = up_to(array_D.shape[0], world_size) - array_D.shape[0]

    return jnp.pad(array_D, [(0, behind)] + [(0, 0)] * (array_D.ndim - 1))


# The form that a JAX user writes: the unsharded program, and arrays that know where they lie.


def placed(layer: Layer, *, mesh: Mesh, cut: Cut) -> Layer:
    """S9, S10: the same layer with every array laid out by `placements`, for `jit` to keep to.

    A dim that does not divide by its axes' sizes stays whole, as NamedSharding wants equal shards.
    """

    def place(array: Num[Array, "..."], spec: PartitionSpec) -> Num[Array, "..."]:
        kept = [_dividing(size, axes, mesh) for size, axes in zip(array.shape, spec, strict=False)]
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*kept)))

    return jax.tree.map(place, layer, placements(layer, cut=cut))


def _dividing(size: int, axes: str | tuple[str, ...] | None, mesh: Mesh) -> str | tuple[str, ...] | None:
    names = (axes,) if isinstance(axes, str) else axes or ()
    ranks = math.prod(mesh.shape[name] for name in names)

    return None if size % ranks else axes
