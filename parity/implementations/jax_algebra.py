"""Link 1 inside JAX: one layer's gradients by closed form, and by differences of the norm-frozen surrogate; float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.case import Case, TrainCase
from parity.inputs import stack_inputs
from parity.job import Place
from parity.oracle.stack import FACTORS, stack_arrays
from parity.shard import Shard, whole_index
from ref import dora
from ref.gradients import closed_form, complex_step, surrogate
from ref.types import Adapter


class _OneLayer:
    """What both routes share: a single layer, and its gradients as shards."""

    units = ""
    gives: tuple[str, ...] = ()

    def refuses(self, case: Case) -> str | None:
        """One layer of float64, unsharded."""
        fits = isinstance(case, TrainCase) and case.compute == "float64" and len(case.layers) == 1
        return None if fits else "link 1 takes one layer in float64"

    def run(self, case: TrainCase, place: Place) -> Iterator[Shard]:
        """The three gradients of step 1."""
        (weight,), _, (adapter,) = stack_arrays(case)
        inputs = stack_inputs(case)
        x, G = (jnp.asarray(inputs[name], dtype=jnp.float64) for name in ("x", "G"))
        found = self.gradients(
            x, weight, adapter, G=G, scaling=dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
        )
        for factor in FACTORS:
            array = np.asarray(getattr(found, factor))
            yield Shard(
                name=f"layers.0.{factor}",
                kind="gradient",
                step=1,
                global_shape=array.shape,
                index=whole_index(array.shape),
                array=array,
            )

    def gradients(self, x: Array, weight: Array, adapter: Adapter, *, G: Array, scaling: float) -> Adapter:
        """The route itself."""
        raise NotImplementedError


class ClosedForm(_OneLayer):
    """G1: no autodiff takes part."""

    def gradients(self, x: Array, weight: Array, adapter: Adapter, *, G: Array, scaling: float) -> Adapter:
        """`ref.gradients.closed_form`."""
        found = closed_form(x, weight, adapter, G_TO=G, scaling=scaling)
        return Adapter(found.lora_A, found.lora_B, found.magnitude)


class Differences(_OneLayer):
    """G2: only values of the surrogate are computed, along each coordinate in turn."""

    def gradients(self, x: Array, weight: Array, adapter: Adapter, *, G: Array, scaling: float) -> Adapter:
        """A complex step a parameter element."""
        n = dora.weight_norm(dora.direction(weight, adapter.lora_A, adapter.lora_B, scaling=scaling))

        def loss(point: Adapter) -> Array:
            y = surrogate(*(_complex(part) for part in (x, weight)), point, n_O=n, scaling=scaling)
            return jnp.sum(_complex(G) * y)

        flat, rebuild = jax.flatten_util.ravel_pytree(adapter)
        slopes = jax.lax.map(lambda along: complex_step(loss, adapter, rebuild(along)), jnp.eye(flat.size))
        return rebuild(slopes)


def _complex(array: Array) -> Array:
    return jax.lax.complex(array, jnp.zeros_like(array))
