"""peft's own DoRA layer, unsharded, in float64: the outside witness of link 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from parity.case import UNSHARDED, StackCase
from parity.implementations.torch_dora import _linear  # a plain nn.Linear with the case's numbers
from parity.implementations.torch_stack import DTYPES, Stack, TorchStack
from parity.inputs import stack_inputs


class PeftWitness(TorchStack):
    """Its parameters are renamed to ours; nothing else is touched."""

    strategies = (UNSHARDED,)
    bases = ("float32", "float64")
    computes = ("float32", "float64")
    gives = ("output", "input_gradient")

    def build(self, case: StackCase, device: str) -> nn.Module:
        """`inject_adapter_in_model` on a stack of linears."""
        arrays = {name: torch.from_numpy(array.copy()) for name, array in stack_inputs(case).items()}
        linears = [_linear(arrays, position, DTYPES[case.base]) for position in range(len(case.layers))]
        targets = [f"layers.{position}" for position in range(len(case.layers))]
        config = LoraConfig(r=case.rank, lora_alpha=case.alpha, use_dora=True, target_modules=targets)
        model = inject_adapter_in_model(config, Stack(linears, case.activation)).to(device, DTYPES[case.base])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(arrays[our_name(name)])
        return _Renamed(model)


class _Renamed(nn.Module):
    """Gives peft's parameters our names, so that the shards can be compared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As peft computes it."""
        return self.model(x)

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        """The same parameters under our names."""
        return ((our_name(name), parameter) for name, parameter in self.model.named_parameters())


def our_name(name: str) -> str:
    """`layers.0.lora_magnitude_vector.default.weight` is `layers.0.magnitude` here."""
    for theirs, ours in (
        (".lora_A.default.weight", ".lora_A"),
        (".lora_B.default.weight", ".lora_B"),
        (".lora_magnitude_vector.default.weight", ".magnitude"),
        (".lora_magnitude_vector.default", ".magnitude"),
        (".base_layer.", ".base."),
    ):
        name = name.replace(theirs, ours)
    return name
