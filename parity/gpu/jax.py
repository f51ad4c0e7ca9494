"""The reference compiled for the device, in float32 and bfloat16, against itself in float64 on the host.

On lattices, whose every product and sum is exact, so that all bits must be equal. Their numbers are short; a unit that
rounds its operands to TF32, JAX's default on such GPUs, is seen by inputs of one 1 each, for which a fresh layer gives
the weight's own columns. `highest` is what the specification needs. The codec's fast twins are compared with
themselves on the host.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.case import TrainCase
from parity.cases.declared import stack_case
from parity.cases.shapes import SHAPES
from parity.gpu.finding import Finding, judged
from parity.inputs import stack_inputs
from ref import dora, gradients, quant_fast
from ref.types import Adapter

TENSORS = ("y", "lora_A", "lora_B", "magnitude", "x")
FEATURES = 1024


def findings(device: str, keep: str) -> Iterator[Finding]:
    """The layer by autodiff and by the closed form, and the codec."""
    jax.config.update("jax_enable_x64", val=True)
    there, host = jax.devices(device)[0], jax.devices("cpu")[0]
    for case, (way, compute) in product(lattices(), WAYS):
        name = f"jax/{way}/{case.shape_name}/{case.base}-{case.compute}"
        if keep in name:
            with jax.default_matmul_precision("highest"):
                got = _computed(case, compute, there, case.compute, "float32")
            want = _computed(case, compute, host, "float64", "float64")
            wrong = sum(int((got[name] != want[name]).sum()) for name in TENSORS)
            yield judged(name, wrong, sum(array.size for array in want.values()), "numbers")
    if keep in "jax/one-hot":
        yield _one_hot(there)
    if keep in "jax/codec":
        yield from _codec(there, host)


def lattices() -> Iterator[TrainCase]:
    """One layer of each shape: only there is bfloat16 exact as well."""
    for shape, (base, compute) in product(SHAPES, (("float32", "float32"), ("bfloat16", "bfloat16"))):
        alone = replace(shape, layers=shape.layers[:1])
        yield stack_case(alone, link="frameworks", inputs="lattice", base=base, compute=compute)


def by_autodiff(x_TI: Array, W_OI: Array, adapter: Adapter, G_TO: Array, *, scaling: float) -> dict[str, Array]:
    """D5: y, and the gradients of sum(G * y)."""
    y_TO, back = jax.vjp(lambda x, a: dora.forward(x, W_OI, a, scaling=scaling), x_TI, adapter)
    dx_TI, d = back(G_TO)
    return {"y": y_TO, "lora_A": d.lora_A, "lora_B": d.lora_B, "magnitude": d.magnitude, "x": dx_TI}


def by_closed_form(x_TI: Array, W_OI: Array, adapter: Adapter, G_TO: Array, *, scaling: float) -> dict[str, Array]:
    """G1, in the adapter's dtype."""
    wide = adapter.magnitude.dtype
    x_TI, W_OI, G_TO = (array.astype(wide) for array in (x_TI, W_OI, G_TO))
    d = gradients.closed_form(x_TI, W_OI, adapter, G_TO=G_TO, scaling=scaling)
    y_TO = dora.forward(x_TI, W_OI, adapter, scaling=scaling)
    return {"y": y_TO, "lora_A": d.lora_A, "lora_B": d.lora_B, "magnitude": d.magnitude, "x": d.x}


WAYS = (("autodiff", by_autodiff), ("closed-form", by_closed_form))


def _computed(case: TrainCase, way: object, device: Any, narrow: str, wide: str) -> dict[str, np.ndarray]:
    """Compiled for the device; narrow is the dtype of x, W and G, wide that of the adapter."""
    numbers = stack_inputs(case)
    x_TI, W_OI, G_TO = (
        jax.device_put(jnp.asarray(numbers[name], narrow), device) for name in ("x", "layers.0.weight", "G")
    )
    factors = ("lora_A", "lora_B", "magnitude")
    adapter = Adapter(*(jax.device_put(jnp.asarray(numbers[f"layers.0.{name}"], wide), device) for name in factors))
    found = jax.jit(way, static_argnames="scaling")(x_TI, W_OI, adapter, G_TO, scaling=case.scaling)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return {name: np.asarray(array, np.float64) for name, array in found.items()}


def _one_hot(there: Any) -> Finding:
    """D12: with B = 0 and m = n, each input gives a column of W, all of its bits."""
    W_OI = np.random.default_rng(0).standard_normal((FEATURES // 4, FEATURES // 8), dtype=np.float32)
    factors = np.zeros((4, W_OI.shape[1]), np.float32), np.zeros((W_OI.shape[0], 4), np.float32)
    with jax.default_device(there), jax.default_matmul_precision("highest"):
        adapter = Adapter(*map(jnp.asarray, factors), dora.weight_norm(jnp.asarray(W_OI)))
        y_TO = dora.forward(jnp.eye(W_OI.shape[1], dtype=jnp.float32), jnp.asarray(W_OI), adapter, scaling=2.0)
    return judged("jax/one-hot", int((np.asarray(y_TO).T != W_OI).sum()), W_OI.size, "numbers")


def _codec(there: Any, host: Any) -> Iterator[Finding]:
    weight = np.random.default_rng(0).standard_normal((FEATURES, FEATURES), dtype=np.float32)
    (packed, state), (want, want_state) = (
        quant_fast.encode_nf4(jax.device_put(weight, device)) for device in (there, host)
    )
    wrong = int((np.asarray(packed) != np.asarray(want)).sum())
    yield judged("jax/codec/packed", wrong, want.size, "bytes")
    got, decoded = quant_fast.decode(packed, state), quant_fast.decode(want, want_state)
    yield judged("jax/codec/decoded", int((np.asarray(got) != np.asarray(decoded)).sum()), decoded.size, "numbers")
