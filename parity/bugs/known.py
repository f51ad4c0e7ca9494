"""Every known bug by name. Each has a mutant that the suite must kill."""

from __future__ import annotations

from parity.bugs.files import FILES
from parity.bugs.layer import LAYER
from parity.bugs.record import Bug, Signature
from parity.bugs.reference import REFERENCE
from parity.bugs.sharding import SHARDING
from parity.bugs.storage import STORAGE
from parity.bugs.training import TRAINING

BUGS: dict[str, Bug] = {bug.name: bug for bug in (*LAYER, *STORAGE, *SHARDING, *TRAINING, *FILES, *REFERENCE)}

CONTROLS = ("NormNotDetached", "SumForMean", "MagnitudeGradNotReduced", "NibbleSwap", "OneRankHalved", "StaleNorm")
"""The mutants that every `run` tries (link 5)."""


def known_as(signature: Signature) -> str:
    """The bugs with that signature, and what it is: `NibbleSwap, Nf4TieUp: the 4-bit codec differs`."""
    names = [bug.name for bug in BUGS.values() if bug.signature is signature]
    return f"{', '.join(names)}: {signature.value}"
