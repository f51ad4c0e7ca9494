"""The reference on a mesh of replicas, shards and tensor ranks (S9, S10): what each virtual device holds.

Axes: N data ranks, T tokens of one (padded with zero tokens to the longest), I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from parity.case import Case, TrainCase
from parity.implementations.jax_sharded import of_step, output_shards, stack_layers
from parity.job import Place
from parity.oracle.stack import FACTORS
from parity.shard import Shard
from ref import mesh, training
from ref.tensor_parallel import Cut
from ref.types import Adapter, Layer


class JaxMesh:
    """Link 2 for tensor-parallel and hybrid JAX."""

    units = ""
    gives = ("output",)

    def refuses(self, case: Case) -> str | None:
        """Stacks in float32, whose features divide among the tensor ranks one way or the other."""
        fits = isinstance(case, TrainCase) and case.strategy.startswith("mesh-") and case.compute == "float32"
        return None if fits else "the mesh takes float32 stacks under mesh-RxSxT"

    def run(self, case: TrainCase, place: Place) -> Iterator[Shard]:
        """Every device's part of gradients, parameters and momenta, at every step."""
        replicate, shard, tensor = case.mesh
        devices = mesh.make_mesh(replicate=replicate, shard=shard, tensor=tensor)
        layers, state = stack_layers(case), None
        cuts = [cut_of(layer, tensor) for layer in layers]
        whole = [mesh.pieces(layer, cut, devices) for layer, cut in zip(layers, cuts, strict=True)]
        held = [_laid_out(of_layer, cut, devices) for of_layer, cut in zip(whole, cuts, strict=True)]
        for step in range(1, case.steps + 1):
            options = {"layers": layers, "mesh": devices, "cuts": cuts, "relu": case.activation == "relu"}
            outputs, gradient = of_step(case, step, partial(_gradients, **options))
            yield from output_shards(case, outputs, step)
            yield from _shards(gradient, whole, devices, step=step, kind="gradient")
            held, state = training.sgd_momentum(held, gradient, state, lr=case.learning_rate, momentum=case.momentum)
            yield from _shards(held, whole, devices, step=step, kind="parameter")
            yield from _shards(state, whole, devices, step=step, kind="optimizer:momentum_buffer")
            layers = [_with_adapter(*parts) for parts in zip(layers, whole, held, strict=True)]


def _gradients(x_NTI: Array, G_NTO: Array, *, layers: list[Layer], **options: Any) -> tuple[Array, list[Adapter]]:
    """Each data rank's output (padded), and the mean gradient as it lies on the mesh."""
    return mesh.sharded_gradients(x_NTI, layers, G_NTO=G_NTO, **options)


def cut_of(layer: Layer, tensor: int) -> Cut:
    """S10: by output features where they divide among the tensor ranks, else by input features."""
    return "column" if layer.weight.shape[0] % tensor == 0 else "row"


def _laid_out(whole: Layer, cut: Cut, devices: Mesh) -> Adapter:
    """The adapter's padded arrays, each device with its part."""
    specs = mesh.placements(whole, cut=cut)
    return Adapter(
        *(
            jax.device_put(getattr(whole.adapter, f).padded, NamedSharding(devices, getattr(specs.adapter, f)))
            for f in FACTORS
        )
    )


def _with_adapter(layer: Layer, whole: Layer, held: Adapter) -> Layer:
    arrays = (getattr(whole.adapter, factor).unpadded(getattr(held, factor)) for factor in FACTORS)
    return Layer(layer.weight, Adapter(*(jnp.asarray(np.asarray(a)) for a in arrays)), layer.bias, layer.scaling)


def _shards(arrays: list[Adapter], whole: list[Layer], devices: Mesh, *, step: int, kind: str) -> Iterator[Shard]:
    ranks = {device: rank for rank, device in enumerate(devices.devices.flat)}
    for position, (of_layer, pieces) in enumerate(zip(arrays, whole, strict=True)):
        for factor in FACTORS:
            array: Array = getattr(of_layer, factor)
            piece: mesh.Piece = getattr(pieces.adapter, factor)
            height = piece.rows * piece.parts
            for part in array.addressable_shards:
                at = [slice(*index.indices(size)[:2]) for index, size in zip(part.index, array.shape, strict=True)]
                rows = piece.whole_rows(at[0])
                yield Shard(
                    name=f"layers.{position}.{factor}",
                    kind=kind,
                    step=step,
                    global_shape=(height, *array.shape[1:]),
                    index=(rows, *at[1:]),
                    array=np.asarray(part.data)[: rows.stop - rows.start],
                    rank=ranks[part.device],
                )
