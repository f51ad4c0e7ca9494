"""The errors of this room: one class for each thing that can be wrong, each with a hint that says the mend.

Clauses: D1, D4, Q7, S6, S7, C1, C3. All derive from `DoraError`, so one `except` catches what this package refuses.
"""


class DoraError(Exception):
    """What this package refuses: a message naming value and place, and `hint`, the mend."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """One line: what is wrong, where, and how to mend it."""
        return f"{self.args[0]}; {self.hint}"


class RankError(DoraError):
    """The adapter's rank is 0, negative, no integer, or larger than both sides of a layer."""


class ScalingError(DoraError):
    """Alpha is 0, NaN or infinite: the scaling s of D1 would be useless or poison the layer."""


class DtypeError(DoraError):
    """A dtype that the named place can't hold or compute in."""


class TargetError(DoraError):
    """`target_modules` match nothing, or something that DoRA isn't defined for here."""


class NonFiniteError(DoraError):
    """A weight holds NaN or infinity; the message names the tensor and the first index (Q7)."""


class MagnitudeRangeError(DoraError):
    """A row's norm is beyond float32, so that its magnitude can't be represented (D4, D11)."""


class StorageError(DoraError):
    """Packed bytes would be cast or misread (S6)."""


class ShardingError(DoraError):
    """A strategy that is unknown, or a model that the strategy can't shard (S7)."""


class AdapterFileError(DoraError):
    """Adapter files that are missing, truncated, or disagree with the model (C1, C3)."""


class OptionError(DoraError):
    """An option of the command line that can't be honoured, alone or beside another."""


class DataError(DoraError):
    """Training text that is missing, unreadable, or too short to train on."""


class ModelFileError(DoraError):
    """A base model's files that are missing, truncated, pickled, or disagree with their configuration (C2, C3)."""


class CheckpointError(DoraError):
    """A training checkpoint that can't be written, isn't whole, or belongs to another run (S12, C3, C4)."""


class TrainingStoppedError(DoraError):
    """A loss or gradient that no step should be made from; the message names step and parameters."""


class PeerLostError(DoraError):
    """A collective failed because another rank is gone."""
