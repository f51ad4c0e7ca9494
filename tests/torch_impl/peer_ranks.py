"""Run by ranks: what torch's clipping and peft's files are under FSDP, for what SPEC.md says under `Differs`."""

import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard


def _sharded(module: nn.Module, strategy: str) -> nn.Module:
    """The module in torch's own wrapper."""
    if strategy == "fsdp2":
        return fully_shard(module)
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=strategy == "fsdp1-orig")


def clipped(*, rank: int, world: int, strategy: str) -> tuple[float, float]:  # noqa: ARG001 - every rank has the batch
    """The norm by which `torch.nn.utils.clip_grad_norm_` clips, on this rank, and that of the whole gradient."""
    norms = []
    for wrap in (lambda module, _: module, _sharded):
        torch.manual_seed(0)
        module = wrap(nn.Linear(6, 5, dtype=torch.float64), strategy)
        module(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 1e-3))
    whole, own = norms
    return float(own.full_tensor() if hasattr(own, "full_tensor") else own), float(whole)


def peft_saves(*, rank: int, world: int, strategy: str, folder: Path) -> dict[str, tuple[int, int]] | str:  # noqa: ARG001
    """How many numbers peft writes under each name, and how many the whole has; or what it raises."""
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base model without a name
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
        whole = {name: tensor.numel() for name, tensor in peft.get_peft_model_state_dict(model).items()}
        wrapped = _sharded(model, strategy)  # keeps the parameters of `model` sharded while it lives
        try:
            model.save_pretrained(folder / str(rank))
        except RuntimeError as error:
            return str(error)
        finally:
            distributed.barrier()
            del wrapped
    written = load_file(folder / str(rank) / "adapter_model.safetensors")
    return {name: (written[name].numel(), size) for name, size in whole.items()}
