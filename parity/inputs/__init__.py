"""Inputs are named arrays, rebuilt from the case alone: `lattice`, `gaussian`, and a pretrained network's.

Axis legend: W (out, in), A (rank, in), B (out, rank), magnitude (out,), x (tokens, in), G (tokens, out).
Names: `x`, `G`, and for each layer `layers.0.weight`, `.bias`, `.lora_A`, `.lora_B`, `.magnitude`; with dropout
`layers.0.keep` (tokens, in), 1 where a number is kept and 0 where it is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import numpy as np

from parity.case import FAINT, Case
from parity.inputs.deal import deal_tokens
from parity.inputs.gaussian import gaussian_stack
from parity.inputs.lattice import integer_stack, lattice_stack

Arrays = dict[str, np.ndarray]


@functools.lru_cache(maxsize=32)
def stack_inputs(case: Case) -> Arrays:
    """The named float32 arrays of a stack; each is exactly representable in the dtype that the case stores it in."""
    if case.faint:  # the same numbers, and a fainter cotangent: a power of two leaves exact what was
        arrays = stack_inputs(dataclasses.replace(case, faint=False))
        return arrays | {"G": arrays["G"] * np.float32(FAINT)}
    generator = np.random.default_rng(input_seed(case))
    return _BUILDERS.get(case.proof, gaussian_stack)(case, generator)


_BUILDERS = {"lattice": lattice_stack, "root": integer_stack}


def input_seed(case: Case) -> int:
    """A seed from what the numbers depend on; never from the strategy, the world or the subject."""
    kind = case.proof if case.proof in _BUILDERS else "gaussian"
    identity = (kind, case.layers, case.rank, case.alpha, case.tokens, case.base, case.compute)
    features = (case.activation, case.bias, case.zero_rows, case.hard_rows, case.zero_b, case.ties, case.seed)
    features += ("dropout",) if case.dropout else ()
    return zlib.crc32(repr((identity, features)).encode())


def batches(case: Case, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What one rank sees at each step: `(x, G)`, with the loss `sum(G * y)`.

    FSDP takes the mean over ranks, so each rank's cotangent carries the world size (S3); a one-hot case
    leaves it out and gives every rank but one a zero cotangent.
    """
    arrays = stack_inputs(case)
    steps = []
    for step in range(case.steps):
        hot, mine = case.hot_rank(step), _tokens(case, rank, step)
        weight = float(case.input_world) if hot is None else float(hot == rank or case.twin_world > 0)
        steps.append((arrays["x"][mine], arrays["G"][mine] * np.float32(weight)))
    return steps


def masks(case: Case, rank: int) -> list[list[np.ndarray]]:
    """D9: at each step, which of each layer's inputs one rank keeps (bool), for the tokens that `batches` gives it."""
    arrays, layers = stack_inputs(case), range(len(case.layers))
    return [
        [arrays[f"layers.{position}.keep"][_tokens(case, rank, step)] != 0 for position in layers]
        for step in range(case.steps)
    ]


def _tokens(case: Case, rank: int, step: int) -> slice:
    """Those of a rank; of a one-hot case's twin, those of the rank whose turn it is."""
    dealt, hot = deal_tokens(case.tokens, case.input_world), case.hot_rank(step)
    return dealt[hot if case.twin_world and hot is not None else rank]


def parts(case: Case, rank: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What one rank sees in each forward of each step, unequal parts of its tokens.

    Where a step has several, the loss is the mean over the tokens of all ranks (T1): their number, a power of two, is
    put into the cotangent, so that the mean is the same number as the sum of a step in one go.
    """
    if case.accumulate == 1:
        return [[batch] for batch in batches(case, rank)]
    arrays = stack_inputs(case)
    mine = deal_tokens(case.tokens, case.input_world)[rank]
    x, G = arrays["x"][mine], arrays["G"][mine] * np.float32(case.tokens)
    forwards = [(x[part], G[part]) for part in deal_tokens(len(x), case.accumulate)]
    return [forwards] * case.steps
