"""Run by ranks: what a rank really holds against what `plan_units` counts from the model before it is sharded."""

import copy
import functools
import warnings
from contextlib import ExitStack
from typing import Any
from unittest import mock

import llama
import peft
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from torch_impl import ShardConfig, shard_model
from torch_impl.preflight.costs import costs
from torch_impl.sharding.units import plan_units


def held(*, rank: int, world: int, strategy: str, kind: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bytes of parameters, bytes of buffers) in memory, and as counted; every rank compares rank 0's count."""
    model = llama.build(kind)
    shard = ShardConfig(strategy=strategy)
    counted = costs(plan_units(copy.deepcopy(model), shard), shard, world_size=world, size=world)
    model = shard_model(model, shard)
    local = [p.to_local() if isinstance(p, DTensor) else p.data for p in model.parameters()]
    kept = sum(p.numel() * p.dtype.itemsize for p in local)
    kept = kept if rank == 0 else counted.parameters
    buffers = sum(b.numel() * b.dtype.itemsize for b in model.buffers())
    return (kept, buffers), (counted.parameters, counted.buffers)


def sent(*, rank: int, world: int, strategy: str, kind: str, again: bool) -> tuple[int, int]:
    """Bytes that one step's gathers and reductions send from this rank, and as counted."""
    model = llama.build(kind)
    shard = ShardConfig(strategy=strategy, reshard_after_forward=again)
    plan = plan_units(model, shard)
    model = shard_model(model, shard)
    whole: list[int] = []
    with ExitStack() as patches:
        for name in ("all_gather", "all_gather_single", "reduce_scatter_single"):
            spy = _spy(getattr(distributed, name), whole)
            patches.enter_context(mock.patch.object(distributed, name, spy))
        llama.loss_of(model, step=0, owner=rank).backward()
    return sum(whole) * (world - 1) // world, costs(plan, shard, world_size=world, size=world).wire


def _spy(collective: Any, whole: list[int]) -> Any:
    """The collective, with the bytes of the larger of its two tensors, the unsharded one, put down."""

    def spy(*given: Any, **named: Any) -> Any:
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor | list)]
        sizes = [sum(t.nbytes for t in value) if isinstance(value, list) else value.nbytes for value in tensors]
        whole.append(max(sizes))
        return collective(*given, **named)

    return spy


def peft_fails(*, rank: int, world: int, base: str, leaves: bool, original: bool) -> str:
    """What FSDP1 says of PEFT's DoRA: blocks are units, and, as PEFT's own policy has it, trainable leaves."""
    model = peft_dora(getattr(torch, base))

    def is_unit(module: nn.Module) -> bool:
        leaf = not any(module.children()) and getattr(module, "weight", None) is not None
        return type(module).__name__ == "LlamaDecoderLayer" or (leaves and leaf and module.weight.requires_grad)

    try:
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_unit)
        cpu = torch.device("cpu")
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=original)
        wrapped(input_ids=torch.arange(8 + rank * world)[None]).logits.float().square().mean().backward()
    except (ValueError, IndexError) as error:
        return str(error)
    return ""


def peft_dora(base: torch.dtype) -> nn.Module:
    """PEFT's DoRA, its adapters in float32, on a small Llama."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).to(base)
    with warnings.catch_warnings():  # peft asks for a property that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
