"""The NF4 codec in JAX against bitsandbytes' CPU code: a 4096 x 4096 float32 weight, plain scales, all threads."""

import time
from collections.abc import Iterator

import jax
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from parity.bench.measure import Row, compare, take_turns
from ref import quant_fast

FEATURES, ROUNDS = 4096, 7


def rows() -> Iterator[Row]:
    """`nf4-encode/bnb` and `nf4-decode/bnb`; both sides use every core, so the wall clock tells."""
    weight = np.random.default_rng(0).standard_normal((FEATURES, FEATURES), dtype=np.float32)
    jax_weight, torch_weight = jax.numpy.asarray(weight), torch.from_numpy(weight)
    encoded = quant_fast.encode_nf4(jax_weight)
    packed, state = quantize_4bit(torch_weight, quant_type="nf4")
    contenders = {
        "encode": lambda: jax.block_until_ready(quant_fast.encode_nf4(jax_weight)),
        "bnb encode": lambda: quantize_4bit(torch_weight, quant_type="nf4"),
        "decode": lambda: jax.block_until_ready(quant_fast.decode(*encoded)),
        "bnb decode": lambda: dequantize_4bit(packed, state),
    }
    seconds = take_turns(contenders, rounds=ROUNDS, clock=time.perf_counter)
    yield compare("nf4-encode/bnb", seconds, ours="encode", peer="bnb encode", limit=1 / 5)
    yield compare("nf4-decode/bnb", seconds, ours="decode", peer="bnb decode", limit=1.25)
