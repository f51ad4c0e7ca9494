"""The reference's side of every exchange of files (C1, C2), and what it refuses itself (Q7, Q8, C3, C4)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from parity.case import Case, CheckpointCase, ExchangeCase, RefuseCase, StackCase
from parity.folders import own_folder
from parity.inputs import stack_inputs
from parity.inputs.llama import LEFT, LINEARS
from parity.job import Place
from parity.oracle.stack import FACTORS
from parity.shard import Shard, whole_index
from ref import codebooks, quant, state
from ref.adapter_files import AdapterConfig, read_adapter, write_adapter
from ref.quantised_checkpoint import read_quantised_checkpoint
from ref.types import Adapter


class JaxFiles:
    """Reads what the subject wrote, or writes what it reads; `meet` takes what is sound and what is bad."""

    units = ""
    gives = ("base",)

    def refuses(self, case: Case) -> str | None:
        """Adapter files of stacks, packed checkpoints, and what it knows to be bad."""
        known = isinstance(case, ExchangeCase) or (isinstance(case, RefuseCase) and case.bad in _MEET)
        return None if known else "the reference has files and refusals alone here"

    def run(self, case: ExchangeCase, place: Place) -> Iterator[Shard]:
        """Every tensor that was read, whole; nothing where it writes."""
        if isinstance(case, CheckpointCase):
            yield from _packed(case, place.folder)
            return
        adapters = _adapters(case)
        if case.direction == "read":
            config = AdapterConfig(rank=case.rank, alpha=case.alpha, rank_stabilized=case.rank_stabilized)
            write_adapter(place.folder, adapters, config)
            return
        weights = {name: stack_inputs(case)[f"{name}.weight"].shape for name in adapters}
        found, config = read_adapter(place.folder, shapes=weights)
        for name, adapter in found.items():
            yield _whole(name, "scaling", np.asarray(np.float32(config.scaling)))
            for factor in FACTORS:
                yield _whole(f"{name}.{factor}", "parameter", np.asarray(getattr(adapter, factor)))

    def meet(self, case: RefuseCase, *, bad: bool) -> None:
        """Take it, or raise."""
        with own_folder() as folder:
            _MEET[case.bad](case, Path(folder), bad)


def _adapters(case: StackCase) -> dict[str, Adapter]:
    inputs = stack_inputs(case)
    names = [f"layers.{position}" for position in range(len(case.layers))]
    return {name: Adapter(*(jnp.asarray(inputs[f"{name}.{factor}"]) for factor in FACTORS)) for name in names}


def _packed(case: CheckpointCase, folder: Path) -> Iterator[Shard]:
    """C2: bytes and scales as they are stored, and every weight as the network will use it."""
    found = read_quantised_checkpoint(folder, dtype=case.compute)
    for name, weight in found.packed.items():
        yield _whole(f"{name}.weight", "packed", np.asarray(weight.packed))
        yield _whole(f"{name}.weight", "absmax", np.asarray(weight.state.absmax))
    for name in LINEARS:
        stacked = found.parameters.layers[name.removeprefix("model.layers.0.")]
        yield _whole(name, "decoded", np.asarray(stacked)[0])
    for name, array in zip(LEFT, (found.parameters.embedding, found.parameters.head), strict=True):
        yield _whole(name, "decoded", np.asarray(array))


def _whole(name: str, kind: str, array: np.ndarray) -> Shard:
    index = whole_index(array.shape)
    return Shard(name=name, kind=kind, step=0, global_shape=array.shape, index=index, array=array)


def _other_codebook(_case: RefuseCase, _folder: Path, bad: bool) -> None:
    """Q8: torchao's table is bitsandbytes' to four decimals."""
    code = np.round(codebooks.NF4_CODE, 4) if bad else codebooks.NF4_CODE
    quant.require_known_code(jnp.asarray(code))


def _pickled_state(case: RefuseCase, folder: Path, bad: bool) -> None:
    """C3: a pickle under the name of a state."""
    tree, path = _adapters(case), folder / "state.safetensors"
    state.save_state(path, [tree], like=tree)
    if bad:
        path.write_bytes(pickle.dumps({"layers": 1}))
    state.load_state(path, tree)


def _shard_for_state(case: RefuseCase, folder: Path, bad: bool) -> None:
    """C4: one rank's rows, said to be all."""
    tree = _adapters(case)
    halves = [jax.tree.map(lambda whole, part=part: jnp.array_split(whole, 2)[part], tree) for part in (0, 1)]
    state.save_state(folder / "state.safetensors", halves[:1] if bad else halves, like=tree)


def _nan_encoded(case: RefuseCase, _folder: Path, bad: bool) -> None:
    """Q7: the codec itself."""
    weight = stack_inputs(case)["layers.1.weight"].copy()
    weight[3, 5] = np.nan if bad else 0.0
    quant.encode(jnp.asarray(weight))


_MEET: dict[str, Callable[[RefuseCase, Path, bool], None]] = {
    "other-codebook": _other_codebook,
    "nan-encoded": _nan_encoded,
    "pickled-state": _pickled_state,
    "shard-for-state": _shard_for_state,
}
