"""The memory of a step, told from shapes alone, is what a real step holds."""

import gc
from typing import Any

import llama
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from torch_impl import DoraConfig, QuantConfig, ShardConfig, apply_dora
from torch_impl.files.materialize import recompute_activations
from torch_impl.layers import dora as layers
from torch_impl.preflight.rehearsal import Storages, rehearsed_peak
from torch_impl.preflight.report import preflight
from torch_impl.training import optim

ABOVE, BELOW = 1.15, 0.98
"""What "about" means: seldom too little, and a mask too much, which transformers makes where it sees fake tensors."""
CONFIG = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


def network(blocks: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama large enough for its activations to outweigh what Python adds."""
    torch.manual_seed(3)
    config = LlamaConfig(**CONFIG, num_key_value_heads=2, num_hidden_layers=blocks, use_cache=False)
    return LlamaForCausalLM(config).to(dtype).train()


def measured(model: nn.Module, *, sequences: int, length: int) -> int:
    """The most bytes that a real step holds in storages that it made itself."""
    tokens = torch.randint(0, CONFIG["vocab_size"], (sequences, length))
    gc.collect()
    with Storages() as storages:
        loss = optim.cross_entropy_sum(model(input_ids=tokens).logits, tokens) / tokens.numel()
        loss.backward()
    return storages.peak


KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "lora": ({"method": "lora"}, torch.float32),
    "dora": ({}, torch.float32),
    "qlora": ({"method": "lora", "quant": QuantConfig()}, torch.float32),
    "qdora": ({"quant": QuantConfig()}, torch.float32),
    "dora-bf16": ({}, torch.bfloat16),
    "qdora-bf16": ({"quant": QuantConfig()}, torch.bfloat16),
    "dropout": ({"dropout": 0.1}, torch.float32),
}


@pytest.mark.parametrize("lean", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsed_step_holds_what_a_real_one_holds(kind: str, lean: bool) -> None:
    """From a plain model and a configuration alone, about what the adapted model's step takes."""
    given, dtype = KINDS[kind]
    config, model = DoraConfig(4, 8, **given), network(dtype=dtype)
    if lean:
        recompute_activations(model)

    told = rehearsed_peak(model, config, sequences=2, length=96)

    held = measured(apply_dora(model, config), sequences=2, length=96)
    assert BELOW * held <= told <= ABOVE * held


def test_an_adapted_model_is_rehearsed_as_it_stands() -> None:
    """A live QDoRA model gives the number that its plan gave, and is left as it was."""
    config = DoraConfig(4, 8, quant=QuantConfig())
    planned = rehearsed_peak(network(), config, sequences=1, length=64)
    model, norm = apply_dora(network(), config), layers.weight_norm
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    live = rehearsed_peak(model, None, sequences=1, length=64)

    assert live == planned
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert layers.weight_norm is norm


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_weights_stored_transposed_are_rehearsed(quant: str | None) -> None:
    """GPT-2's Conv1D layers take what a real step takes, with their weights dense or packed."""
    torch.manual_seed(3)
    shape = {"vocab_size": 640, "n_embd": 64, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**shape, embd_pdrop=0.0, use_cache=False)).train()
    config = DoraConfig(4, 8, quant=quant)

    told = rehearsed_peak(model, config, sequences=2, length=96)

    held = measured(apply_dora(model, config), sequences=2, length=96)
    assert BELOW * held <= told <= ABOVE * held


@pytest.mark.parametrize("lean", [False, True], ids=["kept", "recomputed"])
def test_a_few_blocks_tell_of_all(lean: bool) -> None:
    """Three blocks and what a fourth adds give, to the byte, what six take."""
    model = network(blocks=6)
    if lean:
        recompute_activations(model)

    few, all_ = (rehearsed_peak(model, DoraConfig(4, 8), sequences=1, length=64, depth=d) for d in (3, None))

    assert few == all_


def test_preflight_says_what_a_step_takes() -> None:
    """The estimate at the peak is what lies there at rest, without gradients, and the step."""
    config = DoraConfig(4, 8)

    report = preflight(network(), ShardConfig("none"), world_size=1, dora=config, batch_size=2, seq_len=96)

    costs, step = report.costs, rehearsed_peak(network(), config, sequences=2, length=96)
    assert costs.activations == step
    assert costs.at_peak == costs.parameters + costs.buffers + costs.optimizer + step


class AsksValues(nn.Module):
    """Code that needs a value where a rehearsal has none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Its output depends on numpy's view of the input."""
        return self.layer(torch.from_numpy(input_ids.numpy()).float())


def test_a_model_that_needs_values_is_judged_without_activations() -> None:
    """No number is made up, and the rest of the report stands."""
    report = preflight(AsksValues(), ShardConfig(), dora=DoraConfig(2, 4), seq_len=8)

    assert report.costs.activations == 0
    assert report.ok


def test_what_apply_dora_refuses_is_a_finding_with_tokens_too() -> None:
    """A rank that is too large ends in the finding, not in an exception of the rehearsal."""
    report = preflight(llama.build("f32").cpu(), ShardConfig(), seq_len=16)
    refused = preflight(network(), ShardConfig(), dora=DoraConfig(700, 8), seq_len=16)

    assert report.costs.activations > 0
    assert [f.clause for f in refused.findings if f.level == "error"] == ["D1"]
