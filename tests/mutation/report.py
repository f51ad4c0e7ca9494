"""What a run of mutants says: counts, the rate before anything is listed, and every survivor that is not."""

import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sampling import Lines
from trials import Outcome

Key = tuple[str, str, str, str, int]


def read_equivalents(path: Path) -> dict[Key, str]:
    """The proof of each mutant that no test can tell from the right code, by its key."""
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    return {
        (entry["file"], entry["line"], entry["before"], entry["after"], entry.get("nth", 0)): entry["proof"]
        for entry in entries
    }


@dataclass(frozen=True)
class Report:
    """The outcomes of a run, and what is known of its survivors."""

    generated: int
    outcomes: tuple[Outcome, ...]
    equivalents: dict[Key, str]
    changed: Lines | None
    """The lines that decide the verdict; None where all do."""

    @property
    def survivors(self) -> list[Outcome]:
        """Survivors that are not listed."""
        return [outcome for outcome in self._survived if outcome.key not in self.equivalents]

    @property
    def blocking(self) -> list[Outcome]:
        """The survivors that fail the run."""
        if self.changed is None:
            return self.survivors
        return [outcome for outcome in self.survivors if outcome.line in self.changed.get(outcome.file, ())]

    @property
    def _survived(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.killed_by]

    def lines(self) -> Iterable[str]:
        """The report, a line at a time."""
        ways = Counter(outcome.killed_by for outcome in self.outcomes)
        tried, survived = len(self.outcomes), len(self._survived)
        for outcome in self.survivors:
            yield f"survives {outcome.file}:{outcome.line} ({outcome.kind})  {outcome.text}"
            yield f"         {_short(outcome.before)}  ->  {_short(outcome.after)}"
        files = len({outcome.file for outcome in self.outcomes})
        yield f"{self.generated} mutants, of which {tried} tried in {files} files"
        yield f"killed   {ways['case']} by cases, {ways['test']} by tests, {ways['time']} by their time limit"
        yield f"survived {survived}: {survived - len(self.survivors)} listed as equivalent, {len(self.survivors)} not"
        if tried:
            yield f"killed before listing: {100 * (tried - survived) / tried:.1f} % of those tried"
        if self.changed is not None:
            yield f"on changed lines: {len(self.blocking)} survivors that are not listed"


def _short(text: str, limit: int = 100) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= limit else one_line[: limit - 3] + "..."
