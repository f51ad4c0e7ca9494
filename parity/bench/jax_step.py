"""README's fine-tune in JAX, NF4 over four devices, against the same in PyTorch in one process.

Both sides have all cores. In PyTorch that is a thread a core or, where that is quicker (on a busy machine threads wait
for each other), one alone. In JAX it is four virtual devices, a thread each; the kernel often leaves all four on one
core, as they wake one another, so they are dealt over the cores (`spread_devices`), as torchrun's users do with ranks.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.bench.measure import Row, compare, take_turns
from parity.models.pretrained import locate, token_ids
from ref import checkpoint, finetune, llama, mesh, training
from torch_impl import DoraConfig
from torch_impl.files.materialize import materialize
from torch_impl.training.optim import cross_entropy_sum

DEVICES, SEQUENCES, LENGTH, RANK, ALPHA, LR = 4, 4, 64, 8, 16.0, 1e-3
ROUNDS = 7


def rows() -> Iterator[Row]:
    """`jax-step/torch`."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    yield compare("jax-step/torch", step_seconds(locate(None)), ours="jax", peer="torch", limit=1.25)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def step_seconds(model: Path) -> Mapping[str, list[float]]:
    """Training steps of the whole model on the same tokens, in turn; `torch` is with the better number of threads."""
    ids = token_ids(model, SEQUENCES * (LENGTH + 1)).reshape(SEQUENCES, LENGTH + 1)
    in_jax, in_torch = jax_step(model, ids), torch_step(model, ids)
    in_jax()  # compiles: the threads are there from now on
    spread_devices()
    contenders = {"jax": in_jax} | {
        f"torch {count}": partial(with_threads, count, in_torch) for count in sorted({1, cores()})
    }
    seconds = take_turns(contenders, rounds=ROUNDS, clock=time.perf_counter)
    best = min((name for name in seconds if name != "jax"), key=lambda name: statistics.median(seconds[name]))

    return {"jax": seconds["jax"], "torch": seconds[best]}


def with_threads(count: int, run: Callable[[], None]) -> None:
    """Run with a number of PyTorch's threads."""
    torch.set_num_threads(count)
    run()


def spread_devices() -> None:
    """Deal the threads of XLA's devices over the cores, where the system has a way to; each keeps to its own."""
    tasks, allowed = Path("/proc/self/task"), sorted(os.sched_getaffinity(0))
    threads = [task for task in sorted(tasks.glob("*")) if "XLA" in (task / "comm").read_text()]
    for number, task in enumerate(threads):
        os.sched_setaffinity(int(task.name), {allowed[number % len(allowed)]})


def jax_step(model: Path, ids: np.ndarray) -> Callable[[], None]:
    """README's step: nested NF4, rows, bytes, factors and moments dealt over four devices."""
    config = checkpoint.LlamaConfig.from_json(model / "config.json")
    scaling, on = ALPHA / RANK, mesh.make_mesh(shard=DEVICES)
    packed = finetune.quantised(checkpoint.read_checkpoint(model, dtype="float32"))
    fresh = finetune.initial_adapters(packed, jax.random.key(0), rank=RANK, scaling=scaling)
    frozen, adapters = finetune.cut(packed, on), finetune.cut(fresh, on)
    held = [adapters, finetune.cut(training.adam_start(adapters), on)]
    where = jax.tree.map(lambda array: array.sharding, tuple(held))
    batch = jnp.asarray(ids)

    @partial(jax.jit, out_shardings=(*where, None), donate_argnums=(0, 1))
    def step(adapters, state, frozen, batch):  # noqa: ANN001, ANN202 - pytrees
        def loss(adapters):  # noqa: ANN001, ANN202
            options = {"adapters": finetune.gathered(adapters, on), "scaling": scaling}
            return llama.loss(frozen, batch[:, :-1], batch[:, 1:], config, **options)

        value, gradients = jax.value_and_grad(loss)(adapters)
        gradients, _ = training.clip(gradients, max_norm=1.0)
        return *training.adamw(adapters, gradients, state, lr=LR), value

    def run() -> None:
        held[0], held[1], value = step(*held, frozen, batch)
        value.block_until_ready()

    return run


def torch_step(model: Path, ids: np.ndarray) -> Callable[[], None]:
    """The same in PyTorch, not sharded: what a lone process would do."""
    network = materialize(model, DoraConfig(rank=RANK, alpha=ALPHA, quant="nf4"), dtype=torch.float32).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    batch = torch.from_numpy(ids)

    def run() -> None:
        logits = network(input_ids=batch[:, :-1]).logits
        loss = cross_entropy_sum(logits, batch[:, 1:]) / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return run
