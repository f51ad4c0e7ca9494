"""What SPEC.md says of optax and torch under `Differs`, in training and its checkpoints, by running them."""

import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.distributed import checkpoint

from ref import training

SMALL = {"A": jnp.asarray([3e-4, 0.0]), "B": jnp.asarray([0.0, 4e-4])}
"""Gradients whose norm is 5e-4."""


def test_t2_optax_clips_without_the_addend():
    """At a norm of 5e-4 optax takes max_norm / N, the reference torch's max_norm / (N + 1e-6): 2e-3 apart."""
    rule = optax.clip_by_global_norm(1e-4)
    theirs, _ = rule.update(SMALL, rule.init(SMALL))

    ours, _ = training.clip(SMALL, max_norm=1e-4)

    leaf = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    leaf.grad = torch.tensor([3e-4, 4e-4], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([leaf], 1e-4)
    few = 16 * 2.0**-53
    np.testing.assert_allclose(theirs["A"][0], 3e-4 * 1e-4 / 5e-4, rtol=few)
    np.testing.assert_allclose(ours["A"][0], leaf.grad[0].item(), rtol=few)
    assert theirs["A"][0] / ours["A"][0] == pytest.approx(1 + 1e-6 / 5e-4, rel=few)


def test_t3_optax_ema_damps_the_gradient():
    """The first buffer of optax.ema is the gradient times 1 - momentum, the reference's the gradient itself."""
    rule = optax.ema(0.9, debias=False)
    theirs, _ = rule.update(SMALL, rule.init(SMALL))

    _, ours = training.sgd_momentum(SMALL, SMALL, None, lr=1.0, momentum=0.9)

    np.testing.assert_allclose(theirs["A"], (1 - 0.9) * SMALL["A"], rtol=16 * 2.0**-53)
    np.testing.assert_array_equal(ours["A"], SMALL["A"])


class Payload:
    """What a file could do to its reader: here, leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        """Called by whoever unpickles."""
        return Path.touch, (self.mark,)


def test_c3_torchs_checkpoint_reader_unpickles_its_metadata(tmp_path):
    """Reading the metadata of a distributed checkpoint runs what its writer put there."""
    mark = tmp_path / "was-here"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(mark)))

    with pytest.raises(AttributeError):  # what came is no metadata, but by then it has run
        checkpoint.FileSystemReader(tmp_path).read_metadata()

    assert mark.exists()
