"""bitsandbytes' kernels on the device against the specification: what they pack (Q5, Q6) and what they read back (Q4).

The reference encodes by the profile that describes the device, `bnb-cuda` or `bnb-cpu`. Weights are Gaussian, with a
block of zeros, one of a single value, and values in the middle between two codes.
"""

from collections.abc import Iterator
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import torch
from bitsandbytes.functional import QuantState as BnbState
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from parity.gpu.finding import Finding, judged
from ref import quant
from ref.codebooks import FP4_CODE, NF4_CODE
from ref.types import NestedState, QuantState

CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
BLOCKSIZES = (64, 128, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS, COLUMNS = 96, 1024


def findings(device: str, keep: str) -> Iterator[Finding]:
    """Packed bytes, scales and decoded weights, for each codebook, blocksize, nesting and dtype."""
    jax.config.update("jax_platforms", "cpu")  # the specification is read on the host
    for code, blocksize, nested, dtype in product(CODES, BLOCKSIZES, (False, True), DTYPES):
        name = f"codec/{code}/{blocksize}/{'nested' if nested else 'plain'}/{dtype}"
        if keep in name:
            yield from _compared(name, device, code, blocksize, nested=nested, dtype=dtype)


def weight(code: str, dtype: str) -> np.ndarray:
    """Rows that a codec finds hard, representable in the dtype, in float32."""
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values[0] = 0
    values[1] = -3
    middles = np.asarray(CODES[code], np.float32)
    middles = np.sort(middles)
    values[2, : len(middles) - 1] = (middles[1:] + middles[:-1]) / 2
    values[2, len(middles) - 1] = 1  # the block's scale, so that the middles stay where they are
    return torch.from_numpy(values).to(DTYPES[dtype]).float().numpy()


def _compared(name: str, device: str, code: str, blocksize: int, *, nested: bool, dtype: str) -> Iterator[Finding]:
    values = weight(code, dtype)
    theirs = torch.from_numpy(values).to(device, DTYPES[dtype])
    packed, state = quantize_4bit(theirs, quant_type=code, blocksize=blocksize, compress_statistics=nested)
    decoded = dequantize_4bit(packed, _as_one_row(state))
    profile = "bnb-cuda" if device == "cuda" else "bnb-cpu"
    form = {"quant_type": code, "blocksize": blocksize, "nested": nested}
    form |= {"offset": float(state.offset)} if nested else {}  # data, not for anybody to compute again (Q4)
    ours, our_state = quant.encode(jnp.asarray(values).astype(dtype), profile=profile, **form)
    yield _differing(f"{name}/packed", _bytes(packed), _raw(ours), "bytes")
    yield _differing(f"{name}/absmax", _bytes(state.absmax), _raw(our_state.absmax), "bytes of scales")
    want = quant.decode(jnp.asarray(_bytes(packed)), _as_ours(state), dtype=jnp.dtype(dtype))
    if code == "fp4":  # its second 0 is -0 to some of bitsandbytes' decoders (Q4)
        decoded, want = decoded + 0.0, want + 0
    yield _differing(f"{name}/decoded", _bytes(decoded), _raw(want), "bytes of the weight")


def _as_one_row(state: BnbState) -> BnbState:
    """One decoder of bitsandbytes' begins a block anew with each row (Q1), so it is told of one."""
    form = {"blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": state.dtype}
    shape = torch.Size((1, ROWS * COLUMNS))
    return BnbState(state.absmax, shape=shape, code=state.code, offset=state.offset, state2=state.state2, **form)


def _as_ours(state: BnbState) -> QuantState:
    """What bitsandbytes made, as the specification has it."""
    nested = state.state2 and NestedState(
        _on_host(state.state2.absmax), _on_host(state.state2.code), _on_host(state.offset), state.state2.blocksize
    )
    dtype = str(state.dtype).removeprefix("torch.")
    return QuantState(_on_host(state.absmax), _on_host(state.code), nested, state.blocksize, tuple(state.shape), dtype)


def _on_host(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.cpu().numpy())


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _raw(array: object) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def _differing(name: str, got: np.ndarray, want: np.ndarray, what: str) -> Finding:
    if got.shape != want.shape:
        return Finding(name, "falls short", f"{got.size} {what}, the specification has {want.size}")
    return judged(name, int((got != want).sum()), want.size, what)
