"""Clauses T6, S12, C3 and C4: training state in files, whole, for any number of ranks."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ref import fsdp, state, training
from ref.types import Adapter


def adapter(seed):
    """Gaussian numbers in an adapter's shape."""
    random = np.random.default_rng(seed)
    return Adapter(*(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 4), (5, 2), (5,))))


def step(held, seed):
    """One AdamW step with a gradient that depends on the parameters."""
    parameters, optimizer = held
    gradients = jax.tree.map(lambda p, g: p * g, parameters, adapter(seed))
    return training.adamw(parameters, gradients, optimizer, lr=0.1)


def trained(steps):
    """Parameters and optimizer state after some steps."""
    held = (adapter(0), None)
    for seed in range(1, steps + 1):
        held = step(held, seed)
    return held


def shards(tree, world_size):
    """Each rank's rows of everything that has rows."""

    def held(rank):
        return jax.tree.map(lambda a: fsdp.shard(a, world_size=world_size, rank=rank) if a.ndim else a, tree)

    return [held(rank) for rank in range(world_size)]


def assert_same(got, want):
    """Every leaf, every bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_t6_resumed_is_never_stopped(tmp_path):
    """Two steps, a file, and two more leave the bits of four steps."""
    half = trained(2)
    state.save_state(tmp_path / "state.safetensors", [half], like=half)

    held = state.load_state(tmp_path / "state.safetensors", half)
    for seed in (3, 4):
        held = step(held, seed)

    assert_same(held, trained(4))


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_s12_any_world_size_reads_what_any_wrote(tmp_path, writers, readers):
    """Each reader's rows are those of the whole, bit for bit; empty shards too."""
    whole = trained(2)
    state.save_state(tmp_path / "state.safetensors", shards(whole, writers), like=whole)

    for rank, want in enumerate(shards(whole, readers)):
        got = state.load_state(tmp_path / "state.safetensors", whole, world_size=readers, rank=rank)
        assert_same(got, want)


def test_c4_a_shard_is_not_written_as_the_whole(tmp_path):
    """What some ranks hold is refused, every short tensor named, and no file is there."""
    whole = trained(1)

    with pytest.raises(state.StateMismatch, match=r"lora_A.*lora_B.*magnitude"):
        state.save_state(tmp_path / "state.safetensors", shards(whole, 2)[:1], like=whole)

    assert list(tmp_path.iterdir()) == []


def test_c4_ranks_that_disagree_are_refused(tmp_path):
    """A leaf without rows is the same on all ranks, or the state is none."""
    with pytest.raises(state.StateMismatch, match="differs between ranks"):
        state.save_state(tmp_path / "s", [{"k": jnp.asarray(1)}, {"k": jnp.asarray(2)}], like={"k": jnp.asarray(1)})


def test_c4_every_fault_is_listed_and_nothing_loaded(tmp_path):
    """A missing, an extra, a misshapen tensor and one of another dtype stand in one error."""
    path, whole = tmp_path / "state.safetensors", adapter(0)
    state.save_state(path, [whole], like=whole)
    found = load_file(path)
    found.pop(".lora_A")
    found[".extra"] = np.ones(1, np.float32)
    found[".lora_B"] = found[".lora_B"][:2].copy()
    found[".magnitude"] = found[".magnitude"].astype(np.float16)
    save_file(found, path)

    with pytest.raises(state.StateMismatch, match=r"lora_A is missing.*extra is no part.*lora_B has.*magnitude has"):
        state.load_state(path, whole)


def test_c3_a_pickle_is_refused(tmp_path):
    """A pickle is no state, and is not opened as one."""
    (tmp_path / "state").write_bytes(pickle.dumps({"a": 1}))

    with pytest.raises(state.StateMismatch, match="cannot be read"):
        state.load_state(tmp_path / "state", adapter(0))
