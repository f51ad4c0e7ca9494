"""Training state in files: written whole, read by any number of ranks. Clauses T6, S12, C3, C4.

A tree of arrays (parameters, optimizer state, anything that jax.tree takes apart) lies in one safetensors file, a
tensor for each leaf under its path in the tree. Ranks hold rows of it (S1); leaves with no axis are the same on all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr, tree_flatten_with_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ref.layouts import fsdp2_row_range
from ref.types import InputError

Tree = TypeVar("Tree")


class StateMismatch(InputError):
    """A state that is not the one expected: every tensor in which it differs, and how."""


def save_state(path: Path, shards: Sequence[Tree], *, like: Tree) -> None:
    """S12, C4: write the whole state from what all ranks hold of it.

    Args:
        path: of the file, which is written aside and then put in its place.
        shards: each rank's tree, in order of the ranks; one, the whole, without sharding.
        like: a tree of the whole shapes and dtypes: arrays, or what `jax.eval_shape` gives.

    Raises:
        StateMismatch: where the shards do not make up the whole (C4: a shard is never written as if it were all), or
            where ranks differ in a leaf that has no rows. Nothing is written then.
    """
    named = [_named(tree) for tree in shards]
    faults, whole = [], {}
    for name, wanted in _named(like).items():
        parts = [np.asarray(tree[name]) for tree in named]
        scalar = not wanted.shape
        whole[name] = parts[0] if scalar else np.concatenate(parts)
        if scalar and any(part.tobytes() != parts[0].tobytes() for part in parts):
            faults.append(f"{name} differs between ranks")
        if (whole[name].shape, whole[name].dtype) != (wanted.shape, wanted.dtype):
            faults.append(f"{name} has {_said(whole[name])} on {len(shards)} ranks, wanted {_said(wanted)}")
    _raise_if(faults, hint="give every rank's shard, each once")

    aside = path.with_name(path.name + ".part")
    save_file(whole, aside)
    aside.replace(path)


def load_state(path: Path, like: Tree, *, world_size: int = 1, rank: int = 0) -> Tree:
    """T6, S12, C3: one rank's part of a state, bit for bit, whatever the world size that wrote it.

    Args:
        path: of a file that `save_state` wrote.
        like: a tree of the whole shapes and dtypes.
        world_size: the number of ranks that read.
        rank: which of them this is.

    Raises:
        StateMismatch: tensors that are missing, beside the point, of another shape or dtype, all of them; a file that
            cannot be read. Nothing is loaded then.
    """
    wanted = _named(like)
    try:
        with safe_open(path, "numpy") as stream:
            _require_like({name: stream.get_slice(name) for name in stream.keys()}, wanted)  # noqa: SIM118 - no mapping
            read = {
                name: _rows(stream.get_slice(name) if leaf.shape else stream.get_tensor(name), leaf, world_size, rank)
                for name, leaf in wanted.items()
            }
    except (OSError, SafetensorError) as error:
        raise StateMismatch(f"{path} cannot be read: {error}", hint="give a file that save_state wrote") from error

    return jax.tree.unflatten(jax.tree.structure(like), [read[name] for name in wanted])


def _rows(stored: Any, leaf: Any, world_size: int, rank: int) -> Array:
    """S1: a rank's rows of one tensor."""
    if not leaf.shape:
        return jnp.asarray(stored)
    rows = fsdp2_row_range(leaf.shape[0], world_size=world_size, rank=rank)
    if rows.start == rows.stop:  # which safetensors refuses to slice
        return jnp.zeros((0, *leaf.shape[1:]), leaf.dtype)

    return jnp.asarray(stored[rows])


def _require_like(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [f"{name} is no part of it" for name in sorted(set(stored) - set(wanted))]
    for name in sorted(set(stored) & set(wanted)):
        came = (tuple(stored[name].get_shape()), _DTYPES.get(stored[name].get_dtype(), stored[name].get_dtype()))
        asked = (wanted[name].shape, str(wanted[name].dtype))
        faults += [] if came == asked else [f"{name} has {came[1]} {came[0]}, wanted {asked[1]} {asked[0]}"]
    _raise_if(faults, hint="give the state of the same model and optimizer")


_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32"}


def _named(tree: object) -> dict[str, Any]:
    """The leaves by their path in the tree."""
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _said(array: Any) -> str:
    return f"{array.dtype} {tuple(array.shape)}"


def _raise_if(faults: list[str], *, hint: str) -> None:
    if faults:
        raise StateMismatch("; ".join(faults), hint=hint)
