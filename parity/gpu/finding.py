"""One line of a part: what was looked at, whether it holds, and what was seen."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """What a part found."""

    name: str
    status: Literal["holds", "falls short", "skipped", "shown"]
    """`shown`: a number that is held to no limit."""
    said: str = ""
    """Counts, or the reason."""

    def as_json(self) -> dict[str, Any]:
        """As it is written and sent."""
        return asdict(self)


def judged(name: str, wrong: int, of: int, what: str) -> Finding:
    """Numbers that must be equal to the bit: how many are not."""
    return Finding(name, "falls short" if wrong else "holds", f"{wrong} of {of} {what} differ")
