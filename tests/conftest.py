"""What every test shares: one thread, compilations of JAX that are kept, the Hypothesis profiles, no network."""

import os
import signal

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy load: in each worker, and in what it starts

from parity.models.pretrained import cache_directory

# Before jax loads, and for what tests start: workers share what is compiled, and the next run finds it, in any clone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory() / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before torch loads: kernels must not depend on addresses

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # begun by a shell in the background; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

LONGEST_FILES = (
    *("test_faults.py", "test_finetune.py", "test_nnx.py", "test_quant.py", "test_fsdp.py", "test_dora.py"),
    *("test_layers.py", "test_layouts.py", "test_train.py", "test_mesh.py", "test_onehot.py", "test_readme.py"),
    *("test_training.py", "test_kinds.py", "test_llama.py", "test_rehearsal.py", "test_endings.py", "test_runs.py"),
)
"""Begun first, so that no worker is left alone with one at the end; a file that is missing here costs time only."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and keep the order within each."""
    rank = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
