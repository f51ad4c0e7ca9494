"""What can go wrong while the suite runs: one class a step, each with the mend.

Exit status 2 belongs to `CannotRun` and its kin: the suite could not do as asked. What a case does wrong
(`CaseFailed`) is a result, not an exit.
"""


class ParityError(Exception):
    """An error that names the value, the place and the mend."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """One line: what, then what to do about it."""
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class CannotRun(ParityError):
    """The suite cannot run as asked: exit status 2."""


class UnknownImplementation(CannotRun):
    """`--impl` names nothing that can be imported."""


class NoCaseMatches(CannotRun):
    """`-k` and the other filters leave no case."""


class BadExpression(CannotRun):
    """`-k` cannot be read."""


class WorldNotInTier(CannotRun):
    """`--world` asks for more ranks than any case allows."""


class DeviceUnavailable(CannotRun):
    """`--device` names a device that this machine lacks."""


class LatticeNotExact(ParityError):
    """A lattice case whose numbers would not be exact in the dtype it declares."""


class CaseFailed(ParityError):
    """A rank raised, died or hung while it ran a case."""


class CaseHung(CaseFailed):
    """A rank gave no answer, or not a whole one, in the time that a case may take."""


class NoAnswer(ParityError):
    """What a worker sent cannot be read as an answer to its job."""
