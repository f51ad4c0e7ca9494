"""A pretrained Hugging Face network with DoRA on every linear layer, and each step's loss on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from parity.case import NetworkCase, OffsetCase
from parity.implementations.observed import Forwards, to_numpy
from parity.inputs.network import adapter_factors, predicted_tokens, sequences, starting_magnitude
from parity.job import Place
from parity.shard import Shard
from torch_impl import DoraConfig, DoraLinear, PackedBase, apply_dora


def build_network(case: NetworkCase | OffsetCase, place: Place, config: DoraConfig) -> nn.Module:
    """The first `case.blocks` blocks, frozen, with the case's adapters."""
    from transformers import AutoModelForCausalLM, logging  # noqa: PLC0415 - seconds to import; only networks need it

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.bfloat16 if case.compute == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        place.model, dtype=dtype, num_hidden_layers=case.blocks, use_safetensors=True, local_files_only=True
    )
    model.config.use_cache = False
    model.train()  # as a trainer has it: transformers computes nothing again in evaluation
    model = apply_dora(model.to(place.device), config)
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLinear):
            _fill(case, name, layer)
    return model


@torch.no_grad()
def _fill(case: NetworkCase | OffsetCase, name: str, layer: DoraLinear) -> None:
    factors = adapter_factors(case, name, fan_in=layer.in_features, fan_out=layer.out_features)
    layer.lora_A.copy_(torch.from_numpy(factors[0]))
    layer.lora_B.copy_(torch.from_numpy(factors[1]))
    layer.reset_magnitude()
    layer.magnitude.copy_(torch.from_numpy(starting_magnitude(layer.magnitude.cpu().numpy())))


def offset_shards(model: nn.Module) -> Iterator[Shard]:
    """What each quantised layer's scales were shifted by: data that the oracle decodes with (Q4)."""
    for name, layer in model.named_modules():
        if isinstance(layer, DoraLinear) and isinstance(layer.base, PackedBase):
            offset = to_numpy(layer.base.nested_offset).reshape(())
            yield Shard(name=name, kind="offset", step=0, global_shape=(), index=(), array=offset)


def network_losses(
    case: NetworkCase, place: Place
) -> Callable[[nn.Module, int], tuple[Forwards, list[Callable[[], torch.Tensor]]]]:
    """For each step, what computes this rank's loss: `world * sum_k / N_total` (S3), or one-hot."""
    texts = [torch.from_numpy(ids).to(place.device) for ids in sequences(case, place.model)]
    total = predicted_tokens(case, place.model)

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        hot = case.hot_rank(step)
        if hot is None:
            mine = texts if case.world == 1 else [texts[case.data_rank(place.rank)]]
            return torch.stack([_summed_loss(model, text) for text in mine]).sum() * (case.input_world / total)
        text = texts[hot] if case.twin_world else texts[case.data_rank(place.rank)]
        return _summed_loss(model, text) * (float(case.twin_world > 0 or hot == case.data_rank(place.rank)) / total)

    return lambda model, step: (Forwards(), [partial(loss, model, step)])


def _summed_loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token, summed.

    In float64, for the loss is the suite's and must not be its own largest error: torch's float32 log-softmax keeps
    log p, of size 10 to 20, and its backward takes exp of that, so each p is off by as many ulps, coherently for a
    token. On thirty blocks that alone moved gradients 15 times (median) to 60 times as far as all other roundings.
    """
    logits = model(input_ids=text[None, :-1]).logits[0]
    return functional.cross_entropy(logits.double(), text[1:], reduction="sum")
