"""The reference's own FSDP, written out in `shard_map` on virtual devices, in float32; unsharded as its own twin.

Axis legend: N ranks, T tokens of a rank (padded with zero tokens to the longest), I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.case import UNSHARDED, Case, StackCase, StartCase, TrainCase
from parity.inputs import forward_tokens, parts, stack_inputs
from parity.job import Place
from parity.oracle.stack import FACTORS
from parity.oracle.weights import weight_used
from parity.shard import Shard, whole_index
from ref import dora, fsdp, layouts, training
from ref.types import Adapter, Layer

Tree = TypeVar("Tree")
Rows = list[list[Adapter]]
"""`rows[rank][layer]`: what each rank holds of an adapter, or of its gradient or momentum."""


class JaxSharded:
    """Link 2 for JAX: `ref.fsdp.sharded_gradients`, stepped with SGD-momentum on the shards."""

    units = ""
    gives = ("output",)

    def refuses(self, case: Case) -> str | None:
        """Stacks in float32; unsharded their starting magnitudes alone: all else would be the oracle's own code."""
        trains = isinstance(case, TrainCase) and case.strategy == "shard-map"
        starts = isinstance(case, StartCase) and case.strategy == UNSHARDED
        fits = (trains or starts) and case.compute == "float32"
        return None if fits else "the JAX form takes float32 stacks under shard-map"

    def run(self, case: TrainCase | StartCase, place: Place) -> Iterator[Shard]:
        """Every virtual rank's shards, at every step."""
        layers = stack_layers(case)
        if isinstance(case, StartCase):
            yield from _starting_magnitudes(layers)
            return
        held = _cut([layer.adapter for layer in layers], place.world)
        state = None
        for step in range(1, case.steps + 1):
            outputs, gradient = of_step(case, step, partial(_gradients, layers=layers, relu=case.activation == "relu"))
            yield from output_shards(case, outputs, step)
            yield from _shards(gradient, layers, step, "gradient")
            held, state = training.sgd_momentum(held, gradient, state, lr=case.learning_rate, momentum=case.momentum)
            yield from _shards(held, layers, step, "parameter")
            yield from _shards(state, layers, step, "optimizer:momentum_buffer")
            layers = _with_adapters(layers, held)


def _starting_magnitudes(layers: list[Layer]) -> Iterator[Shard]:
    """D6 in float32, by D13's form: the oracle has D3's."""
    for position, layer in enumerate(layers):
        factors = (layer.weight, layer.adapter.lora_A, layer.adapter.lora_B)
        array = np.asarray(dora.factored_weight_norm(*factors, scaling=layer.scaling))
        name = f"layers.{position}.magnitude"
        index = whole_index(array.shape)
        yield Shard(name=name, kind="parameter", step=0, global_shape=array.shape, index=index, array=array)


def stack_layers(case: StackCase) -> list[Layer]:
    """The stack in float32."""
    inputs = stack_inputs(case)
    scaling = dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
    layers = []
    for position in range(len(case.layers)):
        name = f"layers.{position}"
        bias = inputs.get(f"{name}.bias")
        layers.append(
            Layer(
                weight=weight_used(case, inputs[f"{name}.weight"]).astype(jnp.float32),
                adapter=Adapter(*(jnp.asarray(inputs[f"{name}.{factor}"]) for factor in FACTORS)),
                bias=None if bias is None else jnp.asarray(bias),
                scaling=scaling,
            )
        )
    return layers


def _gradients(x_NTI: Array, G_NTO: Array, *, layers: list[Layer], relu: bool) -> tuple[Array, Rows]:
    """Each rank's output (padded) and its rows of the mean gradient."""
    return fsdp.sharded_gradients(x_NTI, layers, G_NTO=G_NTO, relu=relu)


def of_step(
    case: TrainCase, step: int, gradients: Callable[[Array, Array], tuple[Array, Tree]]
) -> tuple[list[Array], Tree]:
    """T1: the outputs of a step's forwards, from `gradients(x, G)`, and the sum of their gradients."""
    outputs = []

    def gradient(forward: tuple[Array, Array]) -> Tree:
        y_NTO, part = gradients(*forward)
        outputs.append(y_NTO)
        return part

    return outputs, training.accumulated(gradient, _padded_forwards(case, step))


def output_shards(case: TrainCase, outputs: list[Array], step: int) -> Iterator[Shard]:
    """Y of each data rank and forward, less the padding, at the place of its tokens."""
    for forward, y_NTO in enumerate(outputs):
        whole = (case.tokens, y_NTO.shape[-1])
        for rank, y_TO in enumerate(np.asarray(y_NTO)):
            rows = forward_tokens(case, rank, step - 1)[forward]
            yield Shard(
                name="y",
                kind="output",
                step=step,
                global_shape=whole,
                index=(rows, slice(0, whole[1])),
                array=y_TO[: rows.stop - rows.start],
                rank=rank,
            )


def _padded_forwards(case: TrainCase, step: int) -> Iterator[tuple[Array, Array]]:
    """Each data rank's `(x, G)` in each forward of a step, as long as the longest of them."""
    dealt = [parts(case, rank)[step - 1] for rank in range(case.input_world)]
    for forward in zip(*dealt, strict=True):
        longest = max(len(x) for x, _ in forward)
        x_NTI, G_NTO = (jnp.asarray(np.stack([_padded(batch[part], longest) for batch in forward])) for part in (0, 1))
        yield x_NTI, G_NTO * _share(case, longest)


def _share(case: TrainCase, tokens: int) -> Array | float:
    """T1, S3: what each token's loss is weighed by in a mean over the tokens of all ranks and forwards, (tokens, 1)."""
    if case.accumulate == 1:
        return 1.0  # the cotangent carries the world size itself
    mean = partial(training.token_mean_loss, total_tokens=case.tokens, world_size=case.input_world)
    return jax.grad(mean)(jnp.zeros(tokens, jnp.float32))[:, None]


def _padded(tokens: np.ndarray, longest: int) -> np.ndarray:
    """Zero tokens behind: with a zero cotangent they add nothing to any gradient."""
    return np.pad(tokens, ((0, longest - len(tokens)), (0, 0)))


def _cut(adapters: list[Adapter], world: int) -> Rows:
    def rows_of(rank: int) -> list[Adapter]:
        return [jax.tree.map(lambda whole: fsdp.shard(whole, world_size=world, rank=rank), a) for a in adapters]

    return [rows_of(rank) for rank in range(world)]


def _with_adapters(layers: list[Layer], held: Rows) -> list[Layer]:
    """The layers with their adapters put together again from every rank's rows."""
    whole = [jax.tree.map(lambda *rows: fsdp.gather(rows), *per_layer) for per_layer in zip(*held, strict=True)]
    return [
        Layer(weight=layer.weight, adapter=adapter, bias=layer.bias, scaling=layer.scaling)
        for layer, adapter in zip(layers, whole, strict=True)
    ]


def _shards(rows: Rows, layers: list[Layer], step: int, kind: str) -> Iterator[Shard]:
    for rank, held in enumerate(rows):
        for position, (part, layer) in enumerate(zip(held, layers, strict=True)):
            for factor in FACTORS:
                shape = getattr(layer.adapter, factor).shape
                own = layouts.fsdp2_row_range(shape[0], world_size=len(rows), rank=rank)
                yield Shard(
                    name=f"layers.{position}.{factor}",
                    kind=kind,
                    step=step,
                    global_shape=shape,
                    index=(own, *(slice(0, size) for size in shape[1:])),
                    array=np.asarray(getattr(part, factor)),
                    rank=rank,
                )
