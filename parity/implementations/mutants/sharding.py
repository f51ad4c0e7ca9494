"""Bugs of sharding: S1 to S3, S9, S11, D11. The unsharded twin is right, so link 2 must find them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)

from parity.case import Case, SteppedCase
from parity.implementations import torch_dora, torch_stack
from parity.implementations.mutants.base import Mutant, is_sharded
from parity.job import Place
from torch_impl import LocalShard, inject, local_shards
from torch_impl.layers import dora as layers
from torch_impl.layers.norm import weight_norm
from torch_impl.layers.rule import Rule
from torch_impl.sharding import apply as sharding

_ADAPTER = ("lora_A", "lora_B", "magnitude")


class SumForMean(Mutant):
    """The reduction sums and does not divide."""

    def shard(self, model: nn.Module, case: Case) -> nn.Module:
        """Set torch's own divisors to 1."""
        model = super().shard(model, case)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
            if isinstance(module, FullyShardedDataParallel):
                module._gradient_predivide_factor = 1.0  # noqa: SLF001 - the bug is in there
                module._gradient_postdivide_factor = 1.0  # noqa: SLF001
        return model

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """`shard` has done it."""
        return contextlib.nullcontext()


class ReplicasSummed(Mutant):
    """Gradients are averaged within a row of the mesh, and summed across the rows."""

    def shard(self, model: nn.Module, case: Case) -> nn.Module:
        """Divide by the ranks of one row."""
        model = super().shard(model, case)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(case.world // case.copies))
                module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
        return model

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """`shard` has done it."""
        return contextlib.nullcontext()


class OneRankHalved(Mutant):
    """Rank 1 halves what it holds of each gradient."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """After each backward pass."""

        def halve(shard: LocalShard) -> None:
            if place.rank == 1:
                shard.tensor.mul_(0.5)

        return _settling(case, halve)


class MagnitudeGradNotReduced(Mutant):
    """Each rank keeps its own part of its own magnitude gradient."""

    @contextlib.contextmanager
    def planted(self, case: Case, place: Place) -> Iterator[None]:
        """Remember the local gradients as they leave the layers, and put them back after the reduction."""
        own: dict[int, Tensor] = {}
        backward = layers.RuleProduct.backward

        def remembering(ctx: object, G: Tensor) -> tuple[Tensor | None, ...]:
            *before, dm, bias, keep = backward(ctx, G)
            own[len(dm)] = dm.clone()  # the layers of a stack differ in `out`
            return (*before, dm, bias, keep)

        def restore(shard: LocalShard) -> None:
            if shard.name.endswith("magnitude") and shard.global_shape[0] in own:
                shard.tensor.copy_(own[shard.global_shape[0]][shard.index[0]])

        with (
            mock.patch.object(layers.RuleProduct, "backward", staticmethod(remembering)),
            _settling(case, restore),
        ):
            yield


class NormOfOwnColumns(Mutant):
    """A row-parallel layer's norm misses what other tensor ranks have of each row."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """As a layer that isn't cut takes it."""

        def own(layer: layers.DoraLayer, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return weight_norm(W, A, B, scaling=layer.scaling)

        return mock.patch.object(layers.DoraLayer, "row_norms", own)


class TensorGradientNotSummed(Mutant):
    """A column-parallel layer sums dx over tensor ranks, and not dA."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """In the rule."""
        summed = Rule.over_outputs

        def partly(rule: Rule, dA: Tensor, *dx: Tensor, of: Tensor) -> list[Tensor]:
            return [dA, *(summed(rule, *dx, of=of) if dx else ())]

        return mock.patch.object(Rule, "over_outputs", partly)


class ShardReadOutside(Mutant):
    """The norm's B has this rank's part alone, as a parameter has outside of its unit's forward."""

    def __init__(self) -> None:
        self._outside: dict[torch.Size, Tensor] = {}

    def shard(self, model: nn.Module, case: Case) -> nn.Module:
        """Keep what lies there, by shape: the layers of a stack differ in `out`."""
        model = super().shard(model, case)
        for shard in local_shards(model) if is_sharded(case) else ():
            if shard.kind == "parameter" and shard.name.endswith("lora_B"):
                lying = torch.zeros(shard.global_shape)
                part = lying.view(-1) if len(shard.index) == 1 else lying
                part[shard.index] = shard.tensor
                self._outside[lying.shape] = lying
        return model

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Hand it to the norm."""
        self._outside.clear()
        right = layers.weight_norm

        def of_what_lies_there(W: Tensor, A: Tensor, B: Tensor, *, scaling: float, **cut: Any) -> Tensor:
            return right(W, A, self._outside.get(B.shape, B), scaling=scaling, **cut)

        return mock.patch.object(layers, "weight_norm", of_what_lies_there)


class MembersReordered(Mutant):
    """The magnitude is registered before A and B, so that FSDP1 puts it first."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Turn the members round when a layer is made."""
        make = inject.dora_linear

        def reordered(*args: object, **options: object) -> nn.Module:
            layer = make(*args, **options)
            members = [*layer._parameters.items()]  # noqa: SLF001 - torch has no other way to order them
            layer._parameters.clear()  # noqa: SLF001
            layer._parameters.update(reversed(members))  # noqa: SLF001
            return layer

        return mock.patch.object(inject, "dora_linear", reordered)


class ShardSwap(Mutant):
    """Ranks 0 and 1 hold each other's shards."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Exchange the values just before they are read."""

        def swapped(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[LocalShard]:
            shards = list(local_shards(model, optimizer))
            yield from _exchanged(shards, place) if is_sharded(case) else shards

        return mock.patch.object(torch_dora, "local_shards", swapped)


def _exchanged(shards: list[LocalShard], place: Place) -> Iterator[LocalShard]:
    """What ranks 0 and 1 hold of the same tensors, exchanged where both hold as much."""
    gathered: list[dict[tuple[str, str], Tensor]] = [{}] * place.world
    distributed.all_gather_object(gathered, {(shard.name, shard.kind): shard.tensor for shard in shards})
    others = gathered[1 - place.rank] if place.rank in {0, 1} else {}
    for shard in shards:
        other = others.get((shard.name, shard.kind))
        fits = other is not None and other.shape == shard.tensor.shape
        yield dataclasses.replace(shard, tensor=other) if fits else shard


class ChunkFloor(Mutant):
    """Says that it holds `floor(d0 / world)` rows a rank, and the rest on the last."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Misplace FSDP2's shards."""

        def misplaced(shard: LocalShard) -> LocalShard:
            rows = shard.global_shape[0] // place.world
            start = place.rank * rows
            return dataclasses.replace(shard, index=(slice(start, start + len(shard.tensor)), *shard.index[1:]))

        return _misplacing(case, misplaced)


class AlignmentIgnored(Mutant):
    """Computes FSDP1's ranges as if members followed each other without filler."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Shift what comes after the first member by the filler before it."""
        align = 4  # 16 bytes of float32

        def misplaced(shard: LocalShard) -> LocalShard:
            (part,) = shard.index
            if shard.name.rpartition(".")[2] not in _ADAPTER[1:] or part.start == part.stop:
                return shard
            return dataclasses.replace(shard, index=(slice(part.start + align, part.stop + align),))

        return _misplacing(case, misplaced)


class AdapterCastOnWire(Mutant):
    """The adapter's unit has `param_dtype=bfloat16`, like the rest of the model."""

    @contextlib.contextmanager
    def planted(self, case: Case, place: Place) -> Iterator[None]:
        """Give adapter units a policy."""

        def casting(module: nn.Module, **options: object) -> nn.Module:
            if isinstance(module, layers.DoraLinear):
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
            return fully_shard(module, **options)

        with (
            mock.patch.object(sharding, "fully_shard", casting),
            mock.patch.object(sharding, "FullyShardedDataParallel", _CastingFlat),
            mock.patch.object(layers.DoraLinear, "_by_rule", _widening_rule),
        ):
            yield


_right_rule = layers.DoraLinear._by_rule  # noqa: SLF001 - the bug is in there


def _widening_rule(layer: nn.Module, base: nn.Module, x: Tensor, *others: Tensor | None) -> Tensor:
    """The layer computes in float32 with what has come over the wire in bfloat16."""
    *numbers, keep = others
    return _right_rule(layer, base, x, *(other if other is None else other.float() for other in numbers), keep)


class _CastingFlat(FullyShardedDataParallel):
    """FSDP1 that lets bfloat16 reach the adapter's unit."""

    def __init__(self, module: nn.Module, **options: object) -> None:
        if isinstance(module, layers.DoraLinear):
            options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        super().__init__(module, **options)


def _settling(case: Case, change: Callable[[LocalShard], None]) -> contextlib.AbstractContextManager[object]:
    """Change gradient shards in place after each backward pass of a sharded case."""
    right = torch_stack.settle_gradients

    def settle(model: nn.Module, running: SteppedCase) -> None:
        right(model, running)
        for shard in local_shards(model) if is_sharded(case) else ():
            if shard.kind == "gradient":
                change(shard)

    return mock.patch.object(torch_stack, "settle_gradients", settle)


def _misplacing(case: Case, change: Callable[[LocalShard], LocalShard]) -> contextlib.AbstractContextManager[object]:
    """Give other indices for the shards of a sharded case."""

    def misplaced(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[LocalShard]:
        for shard in local_shards(model, optimizer):
            yield change(shard) if is_sharded(case) else shard

    return mock.patch.object(torch_dora, "local_shards", misplaced)


SHARDING_MUTANTS = (
    SumForMean,
    ReplicasSummed,
    OneRankHalved,
    MagnitudeGradNotReduced,
    NormOfOwnColumns,
    TensorGradientNotSummed,
    ShardReadOutside,
    MembersReordered,
    ShardSwap,
    ChunkFloor,
    AlignmentIgnored,
    AdapterCastOnWire,
)
