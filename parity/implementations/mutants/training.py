"""Bugs of the step and of checkpoints: S5, T1, T4, T6. Each run in one go is right, so link 4 must find them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parity.case import Case, SteppedCase
from parity.implementations import torch_stack, torch_training
from parity.implementations.mutants.base import Mutant
from parity.job import Place
from torch_impl.files import checkpoint
from torch_impl.layers import dora as layers
from torch_impl.sharding import apply as sharding
from torch_impl.training import accumulation, optim


class MeanOfMeans(Mutant):
    """Each forward's loss is the mean over its own tokens; forwards and ranks are averaged."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Weigh each forward's sum so that its division by all tokens comes out as one by its own."""
        right = accumulation.backpropagate

        def averaging(model: nn.Module, sums: Sequence[partial[Tensor]], *, total: float, **options: object) -> float:
            weights = [total / (case.world * len(sums) * len(part.args[-1])) for part in sums]
            pairs = zip(sums, weights, strict=True)
            weighted = [lambda part=part, weight=weight: weight * part() for part, weight in pairs]
            return right(model, weighted, total=total, **options)

        return mock.patch.object(torch_training, "backpropagate", averaging)


class GradNormPerShard(Mutant):
    """Each rank clips by the norm of its own shards."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Add nothing up."""
        return mock.patch.object(optim, "reduced", lambda values, **_: list(values))


class OptimizerStateLost(Mutant):
    """A checkpoint restores the parameters alone: moments and momenta begin at zero again."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Read everything, and forget the optimizer's part."""
        right = checkpoint.load_

        def forgetting(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.Saved:
            saved = right(folder, model, optimizer)
            optimizer.state.clear()
            return saved

        return mock.patch.object(checkpoint, "load_", forgetting)


class OptimizerStateDtype(Mutant):
    """AdamW's moments are held in bfloat16."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Round what the optimizer keeps after each step."""
        right = torch_stack.optimizer_for

        def rounding(model: nn.Module, running: SteppedCase) -> torch.optim.Optimizer:
            optimizer = right(model, running)
            optimizer.register_step_post_hook(_round_moments)
            return optimizer

        return mock.patch.object(torch_stack, "optimizer_for", rounding)


@torch.no_grad()
def _round_moments(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(state[name].bfloat16().float())


class AdapterReducedNarrow(Mutant):
    """The reduction's dtype reaches the adapter's unit: its gradients cross the wire in bfloat16."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Give FSDP2's adapter units a policy."""

        def casting(module: nn.Module, **options: object) -> nn.Module:
            if isinstance(module, layers.DoraLinear):
                options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16, cast_forward_inputs=False)
            return fully_shard(module, **options)

        return mock.patch.object(sharding, "fully_shard", casting)


class LateIgnored(Mutant):
    """Gradients that are to be reduced once a step are reduced with every backward pass."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Always synchronise."""
        right = accumulation.synchronised
        return mock.patch.object(accumulation, "synchronised", lambda model, **_: right(model, when=True))


class RecomputationInactive(Mutant):
    """What is to be computed again in the backward pass is kept instead."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Run each layer as if nothing were to be computed again."""
        return mock.patch.object(torch_stack, "recomputed", lambda layer, *told, **_: layer(*told))


class MomentumDampened(Mutant):
    """The gradient enters the momentum by the share that the momentum leaves."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """SGD with dampening, which torch leaves out of the first step."""
        right = torch_stack.optimizer_for

        def dampening(model: nn.Module, running: Case) -> torch.optim.Optimizer:
            optimizer = right(model, running)
            for group in optimizer.param_groups:
                group["dampening"] = group["momentum"]
            return optimizer

        return mock.patch.object(torch_stack, "optimizer_for", dampening)


class ReshardedRowsShifted(Mutant):
    """A checkpoint that is read under another strategy gives each rank its neighbour's rows."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Read everything, and shift B by a row."""
        right = checkpoint.load_

        @torch.no_grad()
        def shifting(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.Saved:
            saved = right(folder, model, optimizer)
            for name, parameter in model.named_parameters() if case.resume != case.strategy else ():
                if name.endswith("lora_B"):
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    local.copy_(local.roll(1, 0))
            return saved

        return mock.patch.object(checkpoint, "load_", shifting)


class RatesLost(Mutant):
    """A checkpoint's learning rate and other settings are not restored."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Read everything, and keep the settings that the optimizer was made with."""
        right = checkpoint.load_

        def keeping(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.Saved:
            made_with = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
            saved = right(folder, model, optimizer)
            for group, settings in zip(optimizer.param_groups, made_with, strict=True):
                group.update(settings)
            return saved

        return mock.patch.object(checkpoint, "load_", keeping)


class GeneratorLost(Mutant):
    """A checkpoint's generators are not restored: dropout draws other masks after resumption."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Read everything, and go on drawing from where the process stands."""
        right = checkpoint.load_

        def drawing_on(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.Saved:
            state = torch.get_rng_state()
            saved = right(folder, model, optimizer)
            torch.set_rng_state(state)
            return saved

        return mock.patch.object(checkpoint, "load_", drawing_on)


TRAINING_MUTANTS = (
    MeanOfMeans,
    GradNormPerShard,
    LateIgnored,
    RecomputationInactive,
    MomentumDampened,
    ReshardedRowsShifted,
    OptimizerStateLost,
    RatesLost,
    GeneratorLost,
    OptimizerStateDtype,
    AdapterReducedNarrow,
)
