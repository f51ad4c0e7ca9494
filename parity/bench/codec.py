"""The NF4 codec in JAX against bitsandbytes' on a CPU: a 4096 x 4096 float32 weight, both sides on all cores."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from parity.bench.measure import Row, compare, take_turns
from ref import quant_fast

FEATURES, ROUNDS = 4096, 15


def rows() -> Iterator[Row]:
    """`nf4-encode/bnb` and `nf4-decode/bnb`, plain scales in blocks of 64."""
    weight = np.random.default_rng(0).standard_normal((FEATURES, FEATURES), dtype=np.float32)
    ours, theirs = jnp.asarray(weight), torch.from_numpy(weight)
    packed, state = quant_fast.encode_nf4(ours)
    their_packed, their_state = quantize_4bit(theirs, quant_type="nf4")
    encode = {
        "ours": lambda: jax.block_until_ready(quant_fast.encode_nf4(ours)),
        "bnb": lambda: quantize_4bit(theirs, quant_type="nf4"),
    }
    decode = {
        "ours": lambda: quant_fast.decode(packed, state).block_until_ready(),
        "bnb": lambda: dequantize_4bit(their_packed, their_state),
    }
    for name, limit, sides in (("nf4-encode/bnb", 0.2, encode), ("nf4-decode/bnb", 1.25, decode)):
        seconds = take_turns(sides, rounds=ROUNDS, warmups=2, clock=time.perf_counter)
        yield compare(name, seconds, ours="ours", peer="bnb", limit=limit)
