"""A mutant of the reference's forms: one of its functions is replaced while a case runs; the oracle keeps its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest import mock

import jax
import jax.numpy as jnp
from jax import Array, lax

from parity.case import RefuseCase, StartCase, TrainCase
from parity.implementations import jax_algebra, jax_files
from parity.implementations.jax_algebra import Differences
from parity.implementations.jax_files import JaxFiles
from parity.implementations.jax_mesh import JaxMesh
from parity.implementations.jax_sharded import JaxSharded
from parity.job import Place
from parity.shard import Shard
from ref import dora, fsdp, tensor_parallel
from ref.types import Adapter, Layer


@contextlib.contextmanager
def _compiled_anew(planted: AbstractContextManager[object]) -> Iterator[None]:
    """Within it the bug is there; what was compiled without it, or with it, is not used on the other side."""
    jax.clear_caches()
    try:
        with planted:
            yield
    finally:
        jax.clear_caches()


class DifferencesOfTheLayer(Differences):
    """The norm follows A and B, as it does in the layer."""

    def run(self, case: TrainCase, place: Place) -> Iterator[Shard]:
        """With the norm computed from the very point."""
        right = jax_algebra.surrogate

        def moving(x: Array, weight: Array, point: Adapter, *, scaling: float, **_held: Array) -> Array:
            V_OI = weight + scaling * (point.lora_B @ point.lora_A)
            return right(x, weight, point, n_O=jnp.sqrt(jnp.sum(V_OI * V_OI, axis=1)), scaling=scaling)

        with _compiled_anew(mock.patch.object(jax_algebra, "surrogate", moving)):
            yield from super().run(case, place)


class NormOfOwnFactor(JaxSharded):
    """Rows of A that lie on other ranks are 0 to the norm."""

    def run(self, case: TrainCase | StartCase, place: Place) -> Iterator[Shard]:
        """With a norm of fewer rows of A."""
        right = fsdp.local_weight_norm

        def of_own_rows(weight: Array, lora_A: Array, lora_B: Array, *, scaling: float) -> Array:
            rows = jnp.arange(len(lora_A)) // -(-len(lora_A) // place.world)
            own = jnp.where((rows == lax.axis_index(fsdp.AXIS))[:, None], lora_A, 0)
            return right(weight, own, lora_B, scaling=scaling)

        with _compiled_anew(mock.patch.object(fsdp, "local_weight_norm", of_own_rows)):
            yield from super().run(case, place)


class RootBeforeTheSum(JaxMesh):
    """The norm of a cut row is the sum of its parts' norms."""

    def run(self, case: TrainCase, place: Place) -> Iterator[Shard]:
        """With the root taken too early."""

        def summed_roots(held: Layer) -> Array:
            V_Oi = dora.direction(held.weight, held.adapter.lora_A, held.adapter.lora_B, scaling=held.scaling)
            return lax.psum(dora.weight_norm(V_Oi), tensor_parallel.TENSOR)

        with _compiled_anew(mock.patch.object(tensor_parallel, "norm_of_cut_rows", summed_roots)):
            yield from super().run(case, place)


class OtherCodebookTaken(JaxFiles):
    """No table is refused."""

    def meet(self, case: RefuseCase, *, bad: bool) -> None:
        """With the question left out."""
        with mock.patch.object(jax_files.quant, "require_known_code"):
            super().meet(case, bad=bad)


MUTANTS: dict[str, type] = {
    mutant.__name__: mutant for mutant in (DifferencesOfTheLayer, NormOfOwnFactor, RootBeforeTheSum, OtherCodebookTaken)
}
"""By name, as `parity.bugs.reference` has them."""
