"""DoRA and QDoRA that train under FSDP: what a user imports.

model = apply_dora(model, DoraConfig(rank=8, alpha=16, quant="nf4"))
model = shard_model(model, ShardConfig(strategy="fsdp2"))
for shard in local_shards(model): shard.name, shard.kind, shard.global_shape, shard.index, shard.tensor
"""
# ruff: noqa: E402 - the logger must be told before anything imports bitsandbytes

import logging

# It warns that an optional kernel for its own layer is absent; that layer is never run here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from torch_impl.compiling import compile_blocks
from torch_impl.config import DoraConfig, QuantConfig, ShardConfig
from torch_impl.errors import DoraError
from torch_impl.files.adapter import load_adapter, save_adapter
from torch_impl.inject import apply_dora
from torch_impl.layers.bases import DenseBase, FrozenBias, PackedBase
from torch_impl.layers.dora import DoraLayer, DoraLinear
from torch_impl.merge import merge_adapter
from torch_impl.sharding.apply import shard_model
from torch_impl.sharding.local_shards import LocalShard, local_shards
from torch_impl.training.watching import watched

__all__ = [
    "DenseBase",
    "DoraConfig",
    "DoraError",
    "DoraLayer",
    "DoraLinear",
    "FrozenBias",
    "LocalShard",
    "PackedBase",
    "QuantConfig",
    "ShardConfig",
    "apply_dora",
    "compile_blocks",
    "load_adapter",
    "local_shards",
    "merge_adapter",
    "save_adapter",
    "shard_model",
    "watched",
]
