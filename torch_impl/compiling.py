"""`compile_blocks`: `torch.compile` of each block by itself, before it is sharded.

Clauses: S7 (what a block is), S8.

A block's forward is one graph without a break, dense or packed in four bits: where D13's norm decides by values which
rows it takes to float64, the graph has one operator. What gathers and reduces a block's unit runs around its forward
and stays outside. Blocks that are alike share what was compiled.
"""

import warnings
from typing import Any

import torch
from torch import nn

from torch_impl.errors import ShardingError
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.experts import DoraExperts
from torch_impl.sharding.units import block_names
from torch_impl.wrappers import is_compiled, is_sharded


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> nn.Module:
    """Compile the forward of every block, each whole.

    Args:
        model: what `apply_dora` returned, unsharded; it is changed in place. Afterwards `shard_model` takes `fsdp2` and
            `hsdp` with `units="block"`, and `ddp`.
        backend: as `torch.compile` has it.

    Returns:
        The same model.

    Raises:
        ShardingError: no DoRA layer, sharded already, or compiled already.
    """
    if is_sharded(model):
        raise ShardingError("the model is sharded already", hint="call compile_blocks before shard_model")
    if is_compiled(model):
        raise ShardingError("its blocks are compiled already", hint="call compile_blocks once")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DoraLayer)}
    if not layers:
        raise ShardingError("the model has no DoRA layer", hint="call apply_dora first")
    blocks = block_names(model, layers)
    innermost = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
    left = [name for name in innermost if _takes_experts_in_turn(model.get_submodule(name))]
    for name in innermost:
        if name not in left:
            block: Any = model.get_submodule(name)
            block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    if left:
        warnings.warn(
            f"{len(left)} blocks are not compiled, {left[0]} among them: which experts tokens visit is known only then",
            stacklevel=2,
        )
    return model


def _takes_experts_in_turn(block: nn.Module) -> bool:
    return any(isinstance(module, DoraExperts) for module in block.modules())
