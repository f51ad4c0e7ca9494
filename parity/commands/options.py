"""What the commands share: which cases are meant, how they are run, and what the exit status says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

HOLDS, FELL_SHORT, CANNOT_RUN, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


@dataclass(frozen=True)
class Selection:
    """Which cases are meant."""

    tier: Annotated[str, arg(metavar="{quick,full}")] = "quick"
    """quick: two blocks of the pretrained network; full: all thirty besides, more shapes, world 8."""
    keep: Annotated[str, arg(name="keep", aliases=["-k"], metavar="EXPR")] = ""
    """Only cases that match: parts of identifiers, clauses or links, joined by and, or, not, ( )."""
    world: Annotated[str, arg(metavar="N[,N...]")] = ""
    """Only cases of these world sizes."""
    seed: int = 0
    """Changes every drawn number of the stacks and of the adapters."""


@dataclass(frozen=True)
class RunOptions(Selection):
    """What to run, on what, and where to write it."""

    impl: Annotated[tuple[str, ...], arg(metavar="NAME|module:Class"), tyro.conf.UseAppendAction] = ()
    """What is put to the proof instead of torch_impl; may be given again."""
    device: Annotated[str, arg(metavar="{cpu,cuda}")] = "cpu"
    """Where the torch ranks compute."""
    model: Annotated[Path | None, arg(metavar="DIR")] = None
    """A Llama-family Hugging Face checkpoint to use instead of SmolLM2-135M."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the whole results stream here."""
    fail_fast: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stop at the first case that falls short."""
