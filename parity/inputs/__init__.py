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

from parity.case import FAINT, StackCase, SteppedCase, TrainCase, default_of, dropout_of
from parity.inputs.deal import deal_tokens
from parity.inputs.gaussian import gaussian_stack
from parity.inputs.lattice import integer_stack, lattice_stack

Arrays = dict[str, np.ndarray]


def stack_inputs(case: StackCase) -> Arrays:
    """The named float32 arrays of a stack; each is exactly representable in the dtype that the case stores it in.

    Drawn once for all cases that differ in how they are sharded: a packed lattice takes most of a second.
    """
    return _drawn(case.undisturbed(world=case.input_world))


@functools.lru_cache(maxsize=64)
def _drawn(case: StackCase) -> Arrays:
    if (
        isinstance(case, TrainCase) and case.faint
    ):  # the same numbers, and a fainter cotangent: a power of two leaves exact what was
        arrays = stack_inputs(dataclasses.replace(case, faint=False))
        return arrays | {"G": arrays["G"] * np.float32(FAINT)}
    generator = np.random.default_rng(input_seed(case))
    return _BUILDERS.get(case.inputs, gaussian_stack)(case, generator)


_BUILDERS = {"lattice": lattice_stack, "integers": integer_stack}
_SEED_WORDS = {"lattice": "lattice", "integers": "root"}


def input_seed(case: StackCase) -> int:
    """A seed from what the numbers depend on; never from the strategy, the world or the subject."""
    identity = (
        _SEED_WORDS.get(case.inputs, "gaussian"),
        case.layers,
        case.rank,
        case.alpha,
        case.tokens,
        case.base,
        case.compute,
    )
    features = (case.activation, case.bias, case.zero_rows, case.hard_rows, case.zero_b)
    features += (case.inputs == "ties", case.seed)
    features += (dropout_of(case),) if dropout_of(case) else ()
    features += (case.blocksize,) if case.blocksize != default_of(StackCase, "blocksize") else ()
    return zlib.crc32(repr((identity, features)).encode())


def parts(case: TrainCase, rank: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What one rank sees in each forward of each step: `(x, G)`, with the loss `sum(G * y)`.

    FSDP takes the mean over ranks, so each rank's cotangent carries the world size (S3); a one-hot case leaves it out
    and gives every rank but one a zero cotangent. Where a step has several forwards, unequal parts of the rank's
    tokens, the loss is the mean over the tokens of all ranks (T1): their number, a power of two, is put into the
    cotangent, so that the mean is the same number as the sum of a step in one go.
    """
    arrays = stack_inputs(case)
    return [
        [
            (arrays["x"][part], arrays["G"][part] * np.float32(_weight(case, rank, step)))
            for part in forward_tokens(case, rank, step)
        ]
        for step in range(case.steps)
    ]


def _weight(case: TrainCase, rank: int, step: int) -> float:
    """What the cotangent is multiplied by."""
    hot = case.hot_rank(step)
    several = float(case.tokens) if case.accumulate > 1 else 1.0  # `backpropagate` gives the world size itself
    if hot is not None:
        return several * float(hot == case.data_rank(rank) or case.twin_world > 0)
    return several if case.accumulate > 1 else float(case.input_world)


def forward_tokens(case: SteppedCase, rank: int, step: int) -> list[slice]:
    """Which of all tokens each forward of a rank's step sees."""
    mine = _tokens(case, rank, step)
    if case.accumulate == 1:
        return [mine]
    dealt = deal_tokens(mine.stop - mine.start, case.accumulate)
    return [slice(mine.start + part.start, mine.start + part.stop) for part in dealt]


def masks(case: TrainCase, rank: int) -> list[list[list[np.ndarray]]]:
    """D9: at each step and forward, which of each layer's inputs one rank keeps (bool)."""
    arrays, layers = stack_inputs(case), range(len(case.layers))
    return [
        [
            [arrays[f"layers.{position}.keep"][part] != 0 for position in layers]
            for part in forward_tokens(case, rank, step)
        ]
        for step in range(case.steps)
    ]


def _tokens(case: SteppedCase, rank: int, step: int) -> slice:
    """Those of a rank; of a one-hot case's twin, those of the rank whose turn it is."""
    dealt, hot = deal_tokens(case.tokens, case.input_world), case.hot_rank(step)
    return dealt[hot if case.twin_world and hot is not None else case.data_rank(rank)]
