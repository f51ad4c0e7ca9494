"""A case is a question of one kind. It is declared, never coded.

Axis legend for shapes: a layer is `(in, out)`, as in `torch.nn.Linear`. Everything that a rank needs to
rebuild the case's inputs is in the case itself, so a case identifier and a seed are a whole reproduction.

    Case                what every question says
      StackCase           ... of a stack of linear layers
        StartCase           the magnitude at start (D6)
        NeutralCase         a fresh adapter's output (D12)
        MergeCase           merged weights (D10)
        ExchangeCase        adapter files (C1)
          CheckpointCase      packed checkpoints (C2)
        RefuseCase          what is bad (Q7, Q8, C1, C3, C4)
        DecodeCase          the four-bit codec (Q1 to Q6)
      SteppedCase         ... of steps of an optimizer
        TrainCase           on a stack
        NetworkCase         on a pretrained network
      OffsetCase          what a network's scales are shifted by (Q4)
      ControlCase         a planted bug (link 5)
"""

from __future__ import annotations

from parity.case.base import (
    LINKS,
    TORCH_STRATEGIES,
    UNSHARDED,
    Case,
    Tolerance,
    default_of,
)
from parity.case.control import ControlCase
from parity.case.decode import DecodeCase
from parity.case.exchange import CheckpointCase, ExchangeCase
from parity.case.merge import MergeCase
from parity.case.network import NetworkCase, OffsetCase
from parity.case.neutral import NeutralCase
from parity.case.refuse import RefuseCase
from parity.case.stack import StackCase
from parity.case.start import StartCase
from parity.case.stepped import LEARNING_RATE, SteppedCase
from parity.case.train import FAINT, TrainCase, dropout_of

__all__ = [
    "FAINT",
    "LEARNING_RATE",
    "LINKS",
    "TORCH_STRATEGIES",
    "UNSHARDED",
    "Case",
    "CheckpointCase",
    "ControlCase",
    "DecodeCase",
    "ExchangeCase",
    "MergeCase",
    "NetworkCase",
    "NeutralCase",
    "OffsetCase",
    "RefuseCase",
    "StackCase",
    "StartCase",
    "SteppedCase",
    "Tolerance",
    "TrainCase",
    "default_of",
    "dropout_of",
]
