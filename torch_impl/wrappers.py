"""What wraps a sharded model: whether anything does, and the names below it.

Clauses: S7, S8.
"""

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WRAPPER = "_fsdp_wrapped_module"
"""Under what name FSDP1 holds the module that it wraps."""


def is_sharded(model: nn.Module) -> bool:
    """Whether a strategy holds any part of the model, be it as part of a larger unit."""
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def is_compiled(model: nn.Module) -> bool:
    """Whether any module's own forward is compiled (`compile_blocks`)."""
    return any(hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable") for module in model.modules())


def without_ddp(model: nn.Module) -> nn.Module:
    """The model itself where DDP wraps it: replicas are whole, and their names are the unwrapped ones."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unwrapped_name(name: str) -> str:
    """The name without FSDP1's wrappers."""
    return ".".join(part for part in name.split(".") if part and part != WRAPPER)
