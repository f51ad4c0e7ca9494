"""Ranks that are to hold parts or copies of one model start from the same one.

Clauses: S1, S9, S10.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn

from torch_impl.errors import ShardingError
from torch_impl.layers.bases import PackedBase


@torch.no_grad()
def start_alike(model: nn.Module, device: torch.device) -> None:
    """S9: what trains starts as the first rank has it, whatever seed each rank drew A with; a collective a dtype."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        alike = [parameter for parameter in trained if parameter.dtype == dtype]
        flat = torch.cat([parameter.detach().flatten() for parameter in alike]).to(device)
        distributed.broadcast(flat, src=0)
        for parameter, values in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            parameter.copy_(values.view_as(parameter))


@torch.no_grad()
def refuse_unlike(model: nn.Module, device: torch.device) -> None:
    """Compare what is frozen, quant states too, by a sum of its bits; two collectives, on `device`.

    Raises:
        ShardingError: some rank has another weight than the rest, or fewer of them: on every rank, naming the first.
    """
    frozen = dict(_frozen(model))
    marks = torch.tensor([*map(_mark, frozen.values())], dtype=torch.int64)
    count = torch.tensor([len(frozen), -len(frozen)], device=device)
    distributed.all_reduce(count, op=distributed.ReduceOp.MAX)
    if int(count[0]) != -int(count[1]):
        raise ShardingError("ranks have models of unlike numbers of weights", hint="give each rank the same model")
    both = torch.cat([marks, -marks]).to(device)
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX)
    most, least = both.cpu().chunk(2)
    differing = (most != -least).nonzero().flatten().tolist()
    if differing:
        name = list(frozen)[differing[0]]
        raise ShardingError(f"{name} is another on some rank", hint="load the same checkpoint on every rank")


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, PackedBase):
            yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in module.state().items())


def _mark(tensor: Tensor) -> int:
    """The sum of its bits as integers; of bytes where the dtype has no integers of its size."""
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.dtype.itemsize, torch.uint8)
    return int(tensor.detach().contiguous().view(whole_numbers).sum(dtype=torch.int64)) if tensor.numel() else 0
