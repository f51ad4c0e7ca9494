"""What `preflight` says: a finding names parameter, clause, consequence and mend.

An `error` is a training that fails or is silently wrong; a `warning` costs precision or much traffic; a `note` is worth
knowing.
"""

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing to know, and how to mend it."""

    level: Level
    """Whether training fails or is wrong, loses precision or time, or neither."""
    parameter: str
    """The first parameter concerned."""
    clause: str
    """The clause that is broken or applies."""
    consequence: str
    """What happens."""
    mend: str
    """What to do."""
    more: int = 0
    """How many further parameters it is said of."""

    def __str__(self) -> str:
        """One line."""
        others = f" and {self.more} more" if self.more else ""
        return f"{self.level}: {self.parameter}{others} ({self.clause}): {self.consequence}; {self.mend}"


def merged(found: list[Finding]) -> list[Finding]:
    """Findings that say the same of many parameters become one."""
    first: dict[tuple[str, ...], list[Finding]] = {}
    for finding in found:
        first.setdefault((finding.level, finding.clause, finding.consequence, finding.mend), []).append(finding)
    return [Finding(**{**vars(group[0]), "more": len(group) - 1}) for group in first.values()]
