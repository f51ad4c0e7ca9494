"""`torch_impl`'s merged weights (D10), its adapter files (C1), and what it refuses (Q7, C3, C4)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from parity.case import UNSHARDED, ExchangeCase, MergeCase, RefuseCase, StackCase
from parity.folders import own_folder
from parity.implementations.observed import to_numpy, whole_shard
from parity.implementations.torch_codec import FOUR_BIT, quant_config
from parity.implementations.torch_stack import DTYPES, shards_now
from parity.implementations.torch_training import common_folder
from parity.shard import Shard
from torch_impl import apply_dora, load_adapter, local_shards, merge_adapter, save_adapter
from torch_impl.files import checkpoint

Makes = Callable[[], nn.Module]
WEIGHTS = "adapter_model.safetensors"


def merged_shards(
    case: MergeCase, made: Makes, plain: Makes, shard: Callable[[nn.Module], nn.Module]
) -> Iterator[Shard]:
    """D10: each layer's merged weight; a sharded adapter goes through its files, as a sharded model is not merged."""
    model = made()
    if case.strategy != UNSHARDED:
        with common_folder() as folder:
            save_adapter(shard(model), folder)
            model = read(case, plain, folder)
            torch.distributed.barrier()
    for name, weight in merge_adapter(model).named_parameters():
        if name.endswith(".weight"):
            yield whole(name, "merged", weight)


def read(case: StackCase, plain: Makes, folder: Path) -> nn.Module:
    """C1: the adapter of a folder on the case's unsharded base."""
    quant = quant_config(case) if case.base in FOUR_BIT else None
    return load_adapter(plain(), folder, quant=quant, compute_dtype=DTYPES[case.compute])


def read_shards(
    case: ExchangeCase, plain: Makes, shard: Callable[[nn.Module], nn.Module], folder: Path
) -> Iterator[Shard]:
    """C1: what each rank holds of an adapter that the reference wrote, and the scaling of each layer."""
    model = read(case, plain, folder)
    for name, layer in model.layers.named_children():
        yield whole(f"layers.{name}", "scaling", torch.tensor(layer.scaling, dtype=torch.float32))
    yield from shards_now(local_shards(model if case.strategy == UNSHARDED else shard(model)), 0, ("parameter",))


def whole(name: str, kind: str, tensor: torch.Tensor) -> Shard:
    """A tensor that this rank has whole."""
    return whole_shard(name, kind, 0, to_numpy(tensor))


def meet(case: RefuseCase, made: Makes, plain: Makes, *, bad: bool) -> None:
    """Take what is sound, refuse what is bad."""
    if case.bad in _WEIGHTS:
        model = plain()
        if bad:
            model.layers[1].weight.data[3, 5] = _WEIGHTS[case.bad]
        apply_dora(model, made().layers[0].config)
        return
    with own_folder() as folder:
        if case.bad in _ADAPTERS:
            save_adapter(made(), folder)
            if bad:
                _ADAPTERS[case.bad](Path(folder))
            read(case, plain, Path(folder))
        else:
            _meet_checkpoint(case, made, Path(folder), bad)


_WEIGHTS = {"nan-weight": float("nan"), "infinite-weight": float("-inf")}


def _pickled(folder: Path) -> None:
    """C3: a pickle under the name of the weights; reading it would leave a mark, and is then no refusal."""
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Mark(str(folder / "adapter_config.json"))))


class _Mark:
    """Whoever unpickles it removes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.remove, (self.path,)


def _without_magnitude(folder: Path) -> None:
    """C1: what made a DoRA a LoRA (axolotl#1589, torchtune#2250)."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "layers.1.lora_magnitude" not in name}, folder / WEIGHTS)


def _one_ranks_rows(folder: Path) -> None:
    """C4: half of a tensor under the whole's name (accelerate#4206)."""
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "layers.0.lora_B" in name)
    save_file(tensors | {name: tensors[name][: len(tensors[name]) // 2].clone()}, folder / WEIGHTS)


_ADAPTERS: dict[str, Callable[[Path], None]] = {
    "pickled-adapter": _pickled,
    "adapter-lacks-magnitude": _without_magnitude,
    "shard-for-adapter": _one_ranks_rows,
}


def _meet_checkpoint(case: RefuseCase, made: Makes, folder: Path, bad: bool) -> None:
    """C3, C4: a file that was cut short, or one that the manifest does not know."""
    model, other = made(), made()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], momentum=0.5) for m in (model, other)]
    place = checkpoint.save(folder, model, optimizers[0], checkpoint.Saved(0, 0, {}))
    if bad and case.bad == "foreign-checkpoint":
        (place / "pickle.bin").write_bytes(pickle.dumps({}))
    elif bad:
        shard = next(place.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-8])
    checkpoint.load_(place, other, optimizers[1])


KNOWN = frozenset({*_WEIGHTS, *_ADAPTERS, "torn-checkpoint", "foreign-checkpoint"})
"""What it can be given."""
