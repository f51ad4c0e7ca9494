"""`torch_impl` put to the proof: stacks, the 4-bit codec, packed checkpoints, and pretrained networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from parity.case import (
    TORCH_STRATEGIES,
    UNSHARDED,
    Case,
    CheckpointCase,
    DecodeCase,
    ExchangeCase,
    MergeCase,
    NetworkCase,
    NeutralCase,
    OffsetCase,
    RefuseCase,
    StackCase,
    StartCase,
    SteppedCase,
    TrainCase,
)
from parity.implementations.held import Held
from parity.implementations.layer_observer import layer_observer
from parity.implementations.torch_checkpoint import packed_shards
from parity.implementations.torch_codec import FOUR_BIT, codec_shards, quant_config
from parity.implementations.torch_experts import LEAF, by_expert, fill_experts, plain_experts
from parity.implementations.torch_files import KNOWN, Makes, meet, merged_shards, read_shards
from parity.implementations.torch_network import build_network, network_losses, offset_shards
from parity.implementations.torch_neutral import neutral_shards
from parity.implementations.torch_stack import DTYPES, Stack, TorchStack, shards_now, train
from parity.inputs import stack_inputs
from parity.job import Place
from parity.shard import Shard
from torch_impl import (
    DoraConfig,
    DoraLinear,
    ShardConfig,
    apply_dora,
    compile_blocks,
    local_shards,
    save_adapter,
    shard_model,
)
from torch_impl.files.materialize import recompute_activations
from torch_impl.layers.experts import DoraExperts


class TorchDora(TorchStack):
    """This project's own implementation."""

    strategies = TORCH_STRATEGIES
    bases = ("float32", "bfloat16", "nf4", "fp4")
    computes = ("float32", "bfloat16", "float16")
    methods = ("dora", "lora")
    links = (*TorchStack.links, "training")
    units = "layer"
    gives = (*TorchStack.gives, "norm", "ratio", "base")

    def refuses(self, case: Case) -> str | None:
        """It takes every model; what it lacks is a strategy."""
        if isinstance(case, RefuseCase) and case.bad not in KNOWN:
            return f"{case.bad} is nothing that it could be given"
        return None if case.strategy in self.strategies else f"strategy {case.strategy!r} is not torch's"

    def run(self, case: Case, place: Place) -> Iterator[Shard]:
        """By the kind of case."""
        shard = partial(self.shard, case=case)
        match case:
            case DecodeCase():
                yield from codec_shards(case, place)
            case CheckpointCase():
                yield from packed_shards(case, place, shard)
            case MergeCase():
                yield from merged_shards(case, *self._makes(case, place), shard)
            case ExchangeCase():
                yield from self._exchange(case, place)
            case StartCase():
                yield from self._run_start(case, place)
            case NeutralCase():
                yield from neutral_shards(case, place, partial(self.build, case), shard)
            case OffsetCase():
                yield from offset_shards(build_network(case, place, dora_config(case)))
            case NetworkCase():
                yield from self._run_network(case, place)
            case TrainCase():
                yield from super().run(case, place)

    def build(self, case: StackCase, device: str) -> nn.Module:
        """A stack of `nn.Linear`, turned into DoRA by the public entry point."""
        arrays = {name: torch.from_numpy(array.copy()) for name, array in stack_inputs(case).items()}
        if isinstance(case, TrainCase) and case.experts:
            return self._build_experts(case, device)
        model = apply_dora(plain_stack(case, device), dora_config(case))
        for name, parameter in model.named_parameters():
            if name in arrays and parameter.requires_grad:
                parameter.data.copy_(arrays[name])
        return _compiled(model) if isinstance(case, TrainCase) and case.compiled else model

    def _build_experts(self, case: TrainCase, device: str) -> nn.Module:
        """D16: one stack, named as PEFT names parameters."""
        model = plain_experts(case, device, torch.float32 if case.base in FOUR_BIT else DTYPES[case.base])
        config = replace(dora_config(case), target_modules=(), target_parameters=[LEAF])
        model = apply_dora(model, config)
        fill_experts(model, case)
        return model

    def shard(self, model: nn.Module, case: Case) -> nn.Module:
        """By the public entry point."""
        shard_size = case.world // case.copies if case.strategy in {"hsdp", "fsdp1-hybrid"} else None
        config = ShardConfig(
            strategy=case.strategy,
            shard_size=shard_size,
            tensor_size=case.tensor if case.strategy == "fsdp2-tp" else None,
            tensor_plan=_tensor_plan(case) if case.tensor_ranks > 1 and isinstance(case, StackCase) else None,
        )
        if isinstance(case, SteppedCase):
            config = replace(
                config,
                param_dtype=DTYPES.get(case.param_dtype or ""),
                reduce_dtype=DTYPES.get(case.reduce_dtype or ""),
                reshard_after_forward=not case.keep_gathered,
                units=case.units or None,
            )
        return shard_model(model, config)

    def holds(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Held]:
        """By the public entry point: where it says that a shard lies is part of what is shown."""
        found = local_shards(model, optimizer)
        parts = (Held(part.name, part.kind, part.global_shape, part.index, part.tensor) for part in found)
        stack = next((layer for layer in model.modules() if isinstance(layer, DoraExperts)), None)
        yield from parts if stack is None else by_expert(parts, stack.rows.groups)

    def observe(self, model: nn.Module, case: SteppedCase) -> Callable[[int], Iterator[Shard]]:
        """How often each layer's forward ran, and the norm and the ratio that it kept for its backward pass."""
        if case.compiled:  # hooks would be a part of the graph
            return super().observe(model, case)
        return layer_observer(model, values=isinstance(case, TrainCase) and _shows_norms(case))

    def _makes(self, case: StackCase, place: Place) -> tuple[Makes, Makes]:
        """What makes the adapted stack, and the plain one."""
        return partial(self.build, case, place.device), partial(plain_stack, case, place.device)

    def _exchange(self, case: ExchangeCase, place: Place) -> Iterator[Shard]:
        """C1: the two ways of an adapter's files."""
        made, plain = self._makes(case, place)
        shard = partial(self.shard, case=case)
        if case.direction == "read":
            yield from read_shards(case, plain, shard, place.folder)
        else:
            save_adapter(made() if case.strategy == UNSHARDED else shard(made()), place.folder)

    def meet(self, case: RefuseCase, *, bad: bool) -> None:
        """Q7, C3, C4: take what is sound, refuse what is bad."""
        meet(case, partial(self.build, case, "cpu"), partial(plain_stack, case, "cpu"), bad=bad)

    def _run_start(self, case: StartCase, place: Place) -> Iterator[Shard]:
        """D6: the magnitudes that the layers give themselves."""
        model = self.build(case, place.device)
        for layer in model.modules():
            if isinstance(layer, DoraLinear):
                layer.reset_magnitude()
        yield from shards_now(self.holds(self.shard(model, case)), 0, ("parameter",), frozen=True)

    def _run_network(self, case: NetworkCase, place: Place) -> Iterator[Shard]:
        """A step on real text; activations are computed again as `torch_impl train` has it (T5)."""
        offsets: list[Shard] = []
        observer: list[Callable[[int], Iterator[Shard]]] = []

        def made(strategy: str) -> nn.Module:
            model = build_network(case, place, dora_config(case))
            if case.recompute:
                recompute_activations(model)
            offsets[:] = offset_shards(model)
            observer[:] = [self.observe(model, case)]
            if case.compiled:
                _compiled(model)
            return model if strategy == UNSHARDED else self.shard(model, replace(case, strategy=strategy))

        def observed(step: int) -> Iterator[Shard]:
            return observer[0](step)  # a resumed run has another

        yield from train(made, case, network_losses(case, place), rank=place.rank, holds=self.holds, observed=observed)
        yield from offsets


def _tensor_plan(case: StackCase) -> dict[str, str]:
    """S10: what a user would write: features are gathered or sliced only where a neighbour wants the other form."""
    names = [f"layers.{position}" for position in range(len(case.layers))]
    rows = [case.is_row_parallel(name) for name in names]
    before, after = [False, *(not row for row in rows[:-1])], [*rows[1:], False]
    return {
        name: ("rowwise" if cut_before else "rowwise_split_input")
        if row
        else ("colwise" if row_after else "colwise_gather_output")
        for name, row, cut_before, row_after in zip(names, rows, before, after, strict=True)
    }


def _compiled(model: nn.Module) -> nn.Module:
    """By the public entry point; a rank compiles for one case after the other, and torch counts how often."""
    torch._dynamo.reset()  # noqa: SLF001 - it has no other name
    return compile_blocks(model)


def _shows_norms(case: TrainCase) -> bool:
    """Whether each layer keeps one norm and one ratio a step."""
    return case.method == "dora" and not case.recompute and not case.experts


def plain_stack(case: StackCase, device: str) -> nn.Module:
    """The base: linear layers, as they were before any adapter."""
    arrays = {name: torch.from_numpy(array.copy()) for name, array in stack_inputs(case).items()}
    stored = torch.float32 if case.base in FOUR_BIT else DTYPES[case.base]
    linears = [_linear(arrays, position, stored) for position in range(len(case.layers))]
    return Stack(linears, case.activation).to(device)


def dora_config(case: Case) -> DoraConfig:
    """What a user would write for this case."""
    config = DoraConfig(
        rank=case.rank,
        alpha=case.alpha,
        rank_stabilized=case.rank_stabilized,
        target_modules="all-linear",
        quant=quant_config(case) if case.base in FOUR_BIT else None,
        compute_dtype=DTYPES[case.compute],
    )
    return replace(config, dropout=case.dropout, method=case.method) if isinstance(case, TrainCase) else config


def _linear(arrays: dict[str, torch.Tensor], position: int, dtype: torch.dtype) -> nn.Linear:
    weight, bias = arrays[f"layers.{position}.weight"], arrays.get(f"layers.{position}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear
