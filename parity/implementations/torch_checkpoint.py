"""A packed checkpoint: written by transformers and bitsandbytes, read by `torch_impl` on every rank (C2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from parity.case import UNSHARDED, CheckpointCase
from parity.implementations.torch_files import whole
from parity.implementations.torch_stack import DTYPES, shards_now
from parity.inputs.llama import llama_sizes, llama_weights
from parity.job import Place
from parity.shard import Shard
from torch_impl import DoraConfig, DoraLinear, local_shards
from torch_impl.files.materialize import materialize


def packed_shards(case: CheckpointCase, place: Place, shard: Callable[[nn.Module], nn.Module]) -> Iterator[Shard]:
    """The bytes that each rank holds, and every packed weight, gathered and decoded on each of them."""
    if place.rank == 0:
        _write(case, place.folder)
    torch.distributed.barrier()
    dtype = DTYPES[case.compute]
    config = DoraConfig(rank=case.rank, alpha=case.alpha, target_modules="all-linear", compute_dtype=dtype)
    model = materialize(place.folder, config).to(place.device)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoraLinear)}
    model = model if case.strategy == UNSHARDED else shard(model)
    yield from shards_now(local_shards(model), 0, ("parameter",), frozen=True)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()  # a base by itself is no unit: its block's forward would gather it
    for name, layer in layers.items():
        with torch.no_grad():
            weight = layer.base(lambda base: base.decode(base.weight, dtype=dtype))
        yield whole(f"{name}.base.weight", "decoded", weight)


def _write(case: CheckpointCase, folder: Path) -> None:
    """Quantise at loading and save, as whoever publishes such a checkpoint does."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, logging  # noqa: PLC0415 - takes seconds

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    weights, dtype = llama_weights(case), DTYPES[case.compute]
    model = LlamaForCausalLM(LlamaConfig(**llama_sizes(case))).to(dtype)
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data.copy_(torch.from_numpy(weights[name]))
    model.save_pretrained(folder / "plain")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=case.base,
        bnb_4bit_use_double_quant=not case.flat,
        bnb_4bit_quant_storage=case.storage,
    )
    packed = LlamaForCausalLM.from_pretrained(
        folder / "plain", quantization_config=four_bit, device_map="cpu", dtype=dtype
    )
    packed.save_pretrained(folder)
