"""An optimizer made before `shard_model`: its parameters are the model's no longer, so that its steps train nothing."""

import functools
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_impl.errors import ShardingError

_replaced: dict[int, tuple[str, weakref.ref[nn.Parameter]]] = {}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer may hold by now."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def watch_replaced(before: dict[str, nn.Parameter], sharded: nn.Module) -> None:
    """From now on the step of an optimizer that holds one of these, where the sharded model does not, is refused."""
    kept = {id(parameter) for parameter in sharded.parameters()}
    for name, parameter in before.items():
        if id(parameter) not in kept:
            _replaced[id(parameter)] = name, weakref.ref(parameter, functools.partial(_forget, id(parameter)))
    _watch_steps()


def _forget(gone: int, _: object) -> None:
    """Nobody holds it any more: its number may come to be another's."""
    _replaced.pop(gone, None)


@functools.cache
def _watch_steps() -> None:
    """Once a process: torch's hook of every optimizer."""
    register_optimizer_step_pre_hook(_refuse_stale)


def _refuse_stale(optimizer: Optimizer, *_: Any) -> None:
    """Before each step.

    Raises:
        ShardingError: the optimizer was made before `shard_model`.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        name, held = _replaced.get(id(parameter), ("", None))
        if held is not None and held() is parameter:
            raise ShardingError(
                f"the optimizer was made before shard_model: its {name} is the model's no longer",
                hint="make it of what shard_model returns",
            )
