"""What is run against a mutant, and what came of it.

`plan.toml` says for each source file which cases and which tests cover it. They run in this order until one of them
fails: the mutant is killed then. Where there is a map, of the tests only those that run the line are taken, quickest
first. Each step first has to pass, once, where nothing is wrong; that also says how long it may take before it counts
as hung, which kills too; but only if it does so again after the step was measured anew, as machines become busy.
"""

import json
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import warm
from chart import Chart
from copies import Copy
from operators import Mutant

_SLOWER = 4.0
"""How many times its own time a step may take, since a machine that others use is not always as fast."""
_EXTRA_SECONDS = 20.0
_TESTS_SECONDS = 20.0
"""How long the tests of one line may take together: of more, the quickest are taken."""


class PlanFailsError(RuntimeError):
    """A case or a test fails, or does not exist, where no mutant is."""


@dataclass(frozen=True)
class Step:
    """One command that may kill a mutant."""

    kind: Literal["case", "test", "ranks"]
    """`ranks` are tests too, whose work is done in other processes: no map knows what they run."""
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """As `warm.run` takes it."""
        if self.kind == "case":
            return ["parity", "run", "--fail-fast", "-k", *self.arguments]
        marks = "not long and not distributed" if self.kind == "test" else "not long"
        return ["pytest", "-m", marks, *self.arguments]

    def narrowed(self, chart: Chart, mutant: Mutant) -> "Step":
        """Only the tests that run the mutant's line; all where the map knows none, as of lines outside of functions.

        Test files that are newer than the map are taken whole.
        """
        if self.kind != "test" or not chart.is_of(mutant.file):
            return self
        known = {file for file in self.arguments if chart.is_of(file)}
        tests = chart.tests(mutant.file, mutant.line, among=known, seconds=_TESTS_SECONDS)
        newer = (file for file in self.arguments if file not in known)
        return Step(self.kind, (*tests, *newer)) if tests else self


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; a line of the results file."""

    file: str
    line: int
    kind: str
    text: str
    before: str
    after: str
    nth: int
    killed_by: str
    """`case`, `test` or `time`; empty where it survives."""
    step: str
    """The command that killed it, cut short where it is long."""
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """`Mutant.key`."""
        return self.file, self.text, self.before, self.after, self.nth


def plan(path: Path) -> dict[str, list[Step]]:
    """The steps of every source file."""
    steps: dict[str, list[Step]] = {}
    for group in tomllib.loads(path.read_text(encoding="utf-8"))["group"]:
        cases = [Step("case", (expression,)) for expression in group.get("cases", ())]
        tests = [Step("test", tuple(group["tests"]))] if "tests" in group else []
        ranks = [Step("ranks", tuple(shlex.split(arguments))) for arguments in group.get("ranks", ())]
        for file in group["files"]:
            steps[file] = [*steps.get(file, ()), *cases, *tests, *ranks]
    return steps


@dataclass
class Trials:
    """Tries mutants in a copy of the project, one at a time."""

    copy: Copy
    steps: dict[str, list[Step]]
    chart: Chart
    tests_first: bool = False
    _seconds: dict[Step, float] = field(default_factory=dict)

    def try_mutant(self, mutant: Mutant) -> Outcome:
        """Run what covers its line until it is killed.

        Raises:
            PlanFailsError: a step does not pass without the mutant.
        """
        spent = 0.0
        for whole in self._ordered(mutant.file):
            step = whole.narrowed(self.chart, mutant)
            ending = self._with(mutant, step, self._seconds_without(step))
            spent += ending.seconds
            if ending.code is None:
                ending = self._with(mutant, step, self._measured(step))
                spent += ending.seconds
            if ending.code != 0:
                killed_by = "time" if ending.code is None else "case" if step.kind == "case" else "test"
                return _outcome(mutant, killed_by=killed_by, step=step, seconds=spent)
        return _outcome(mutant, killed_by="", step=None, seconds=spent)

    def _with(self, mutant: Mutant, step: Step, seconds_without: float) -> warm.Ending:
        """Run a step where the mutant is."""
        limit = _SLOWER * seconds_without + _EXTRA_SECONDS
        with self.copy.with_mutant(mutant):
            return warm.run(step.command, folder=self.copy.folder, seconds=limit, compile_files=False)

    def _ordered(self, file: str) -> list[Step]:
        kinds = ("test", "case", "ranks") if self.tests_first else ("case", "test", "ranks")
        return sorted(self.steps[file], key=lambda step: kinds.index(step.kind))

    def _seconds_without(self, step: Step) -> float:
        """How long the step takes where nothing is wrong; the tests of a map have passed when it was made."""
        if step not in self._seconds and self.chart.knows(step.arguments):
            return self.chart.seconds(step.arguments)
        return self._seconds[step] if step in self._seconds else self._measured(step)

    def _measured(self, step: Step) -> float:
        """How long it takes now."""
        ending = warm.run(step.command, folder=self.copy.folder, seconds=600.0, compile_files=True)
        if ending.code != 0:
            raise PlanFailsError(f"{' '.join(step.command)[:200]} ends with {ending.code}:\n{ending.said}")
        self._seconds[step] = ending.seconds
        return ending.seconds


def _outcome(mutant: Mutant, *, killed_by: str, step: Step | None, seconds: float) -> Outcome:
    same = {name: getattr(mutant, name) for name in ("file", "line", "kind", "text", "before", "after", "nth")}
    command = " ".join(step.command)[:120] if step else ""
    return Outcome(**same, killed_by=killed_by, step=command, seconds=round(seconds, 2))


def read_outcomes(path: Path) -> Iterator[Outcome]:
    """The lines of a results file; a line that was cut off is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Outcome(**json.loads(line))
        except ValueError:
            continue


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Keep an outcome at once, so that an interrupted run can go on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")
