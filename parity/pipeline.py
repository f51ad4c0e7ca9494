"""The one way through: case -> inputs -> oracle -> ranks -> shards -> checks.

Ranks build a case's inputs themselves, from the case; the oracle answers in a process of its own, ahead of the
ranks; nothing that is expected ever reaches an implementation.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Self, TypeGuard

import numpy as np

from parity.case import (
    UNSHARDED,
    Case,
    ExchangeCase,
    MergeCase,
    NetworkCase,
    NeutralCase,
    OffsetCase,
    RefuseCase,
    StartCase,
    SteppedCase,
    TrainCase,
)
from parity.checks.collectives import check_collectives
from parity.checks.coverage import HeldBy, check_layout, copies_of, frozen_gradients, missing_elements
from parity.checks.expectation import TABLE, Expectations, from_itself, from_oracle, from_twin
from parity.checks.itself import as_declared, unchanged
from parity.checks.refusal import check_refusal
from parity.checks.shard_check import Check, check_shard
from parity.errors import CaseFailed, CaseHung
from parity.folders import own_folder, sweep_leftovers
from parity.implementations.registry import FILES, runs_in_jax
from parity.job import Job, RankAnswer
from parity.oracle.prediction import LayoutQuestion, Layouts, Predictions
from parity.printable import printable
from parity.report.results import ASIDE, CaseResult, Status, group_of
from parity.shard import Shard
from parity.workers.jax_process import Offsets, Oracle
from parity.workers.lookahead import Ahead
from parity.workers.torch_ranks import Pools

Assignment = tuple[Case, str]
"""A case and the implementation that runs it."""

NO_MODEL = "no pretrained weights: "
MOST_HANGS = 3
"""Cases in a row without an answer in time, after which an implementation is taken to be hanging."""


class Pipeline:
    """Runs cases. A context manager: leaving it leaves no process behind.

    `seconds` is the limit of a case, where it is to be another than `limit_seconds` gives; with `notes_calls` the
    oracle notes which functions of the specification it calls, and is slower.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        model: Path | None = None,
        no_model: str = "",
        cache: Path,
        seconds: float | None = None,
        notes_calls: bool = False,
    ) -> None:
        sweep_leftovers()
        self._pools = Pools(device=device, model=model)
        self._oracle = Oracle(model=model, cache=cache, notes_calls=notes_calls)
        self._ahead = Ahead()
        self._no_model = no_model
        self._seconds = seconds
        self._hangs: Counter[str] = Counter()
        self._twins: dict[tuple[Case, str], list[Shard]] = {}
        self._layouts: dict[Case, Future[Layouts]] = {}
        self._jax_answers: dict[Job, Future[list[RankAnswer]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._oracle.close()
        self._ahead.close()
        self._pools.__exit__(*exception)

    def run(self, assignments: Iterable[Assignment]) -> Iterator[CaseResult]:
        """Run each case in turn; the JAX process works ahead through all that it will be asked, in the same order.

        Networks keep it busy for long: all that a case before them needs is asked for first.
        """
        waiting = [(case, implementation, self._ask(case, implementation)) for case, implementation in assignments]
        for place, (case, implementation, predictions) in enumerate(waiting):
            if isinstance(case, NetworkCase):  # large: idle ranks of other worlds would be in its way
                self._pools.keep({1, *(later.world for later, *_ in waiting[place:])})
            yield self._run_case(case, implementation, predictions)

    def ran(self) -> list[str]:
        """The functions of the specification that have run so far, where calls are noted."""
        return self._ahead.submit(self._oracle.ran).result()

    def _ask(self, case: Case, implementation: str) -> Future[Predictions] | None:
        """Nothing to ask where the unsharded twin alone is the expectation."""
        if isinstance(case, NetworkCase) and self._no_model:
            return None
        predictions = None
        if _has_layout(case):
            self._layout(case)
        if TABLE[case.tolerance].against == "oracle":
            offsets = self._offsets(case, implementation)
            ask = partial(self._oracle.predict, case, offsets, seconds=self._limit(case))
            predictions = self._ahead.submit(ask)
        if runs_in_jax(implementation):
            self._ask_jax(Job(case, implementation))
            if case.has_twin:
                self._ask_jax(Job(case.unsharded_twin(), implementation))
        return predictions

    def _offsets(self, case: Case, implementation: str) -> Offsets:
        """What a quantised network's scales are shifted by, which the oracle needs as data (Q4); the rest has none."""
        if not (isinstance(case, NetworkCase) and case.base == "nf4"):
            return ()
        try:
            shards = self._run_twin(case.offsets(), implementation)
        except CaseFailed:
            return ()  # the case itself will fail in the same way, and say so
        return tuple((s.name, float(s.array)) for s in shards if s.kind == "offset" and s.array.shape == ())

    def _ask_jax(self, job: Job) -> Future[list[RankAnswer]]:
        """Each job once: twins are shared."""
        if job not in self._jax_answers:
            self._jax_answers[job] = self._ahead.submit(partial(self._oracle.run, job, seconds=self._limit(job.case)))
        return self._jax_answers[job]

    def _run_case(self, case: Case, implementation: str, predictions: Future[Predictions] | None) -> CaseResult:
        start = time.monotonic()

        def result(status: Status, checks: Iterable[Check] = (), reason: str = "") -> CaseResult:
            seconds = time.monotonic() - start
            return CaseResult(
                case=case,
                implementation=implementation,
                status=status,
                seconds=seconds,
                checks=tuple(checks),
                reason=reason,
            )

        if isinstance(case, NetworkCase) and self._no_model:
            return result("skipped", reason=NO_MODEL + self._no_model)
        try:
            answers = self._run_implementation(case, implementation)
            refused = next((answer.refused for answer in answers if answer.refused), None)
            if refused:
                return result("skipped", reason=refused)
            with np.errstate(invalid="ignore", over="ignore"):  # infinities are judged, and nothing to warn of
                checks = self._check(case, implementation, answers, predictions)
        except CaseFailed as error:
            return result("error", reason=printable(str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the cases that follow are not to be lost
            said = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(said.filename).name}:{said.lineno}"
            return result("error", reason=printable(f"the judge raised {type(error).__name__}: {error} ({where})"))
        if not checks:
            return result("error", reason="the implementation gave nothing that could be checked")
        return result(status_of(checks), checks)

    def _run_implementation(self, case: Case, implementation: str) -> list[RankAnswer]:
        job = Job(case, implementation)
        if isinstance(case, ExchangeCase):
            return self._exchange(job, case)
        if runs_in_jax(implementation):
            return self._ask_jax(job).result()
        return self._run_on_ranks(job)

    def _run_on_ranks(self, job: Job) -> list[RankAnswer]:
        """Who hangs again and again is not asked again: a hundred cases would take hours to say the same."""
        if self._hangs[job.implementation] >= MOST_HANGS:
            raise CaseFailed(f"not run: {job.implementation} is hanging, it gave no answer {MOST_HANGS} times in a row")
        try:
            answers = self._pools.run(job, seconds=self._limit(job.case))
        except CaseHung:
            self._hangs[job.implementation] += 1
            raise
        except CaseFailed:
            self._hangs[job.implementation] = 0
            raise
        self._hangs[job.implementation] = 0
        return answers

    def _limit(self, case: Case) -> float:
        return self._seconds or limit_seconds(case)

    def _exchange(self, job: Job, case: ExchangeCase) -> list[RankAnswer]:
        """C1, C2: one side writes files, then the other reads them; what the readers hold is the answer."""
        seconds = self._limit(case)
        with own_folder() as folder:
            ours = dataclasses.replace(job, folder=Path(folder))
            theirs = dataclasses.replace(ours, implementation=FILES)
            ask = partial(self._oracle.run, theirs, seconds=seconds)
            if case.direction == "written":
                written = self._run_on_ranks(ours)
                refused = [answer for answer in written if answer.refused]
                return refused or [*written, *self._ahead.submit(ask, urgent=True).result()]
            self._ahead.submit(ask, urgent=True).result()
            return self._run_on_ranks(ours)

    def _check(
        self, case: Case, implementation: str, answers: list[RankAnswer], predictions: Future[Predictions] | None
    ) -> list[Check]:
        if isinstance(case, RefuseCase):
            return [check_refusal(case, answer.said) for answer in answers]
        shards = [shard for answer in answers for shard in answer.shards]
        answer = answers[0]
        held_by = partial(copies_of, case) if answer.units and not _may_be_whole(case) else None
        expectations = self._expectations(case, implementation, shards, predictions)
        checks = compare(shards, expectations, held_by, gives=answer.gives)
        if isinstance(case, SteppedCase):
            checks += [*unchanged(case, shards), *as_declared(case, shards)]
        if answer.units and isinstance(case, TrainCase):  # who has other units gathers another number of times
            checks += check_collectives(case, shards)
        if answer.units and _has_layout(case):
            checks += check_layout(case, shards, self._layout(case).result())
        return checks

    def _layout(self, case: TrainCase | StartCase) -> Future[Layouts]:
        """Each layout once: many cases share one."""
        asked = layout_case(case)
        if asked not in self._layouts:
            self._layouts[asked] = self._ahead.submit(partial(self._oracle.layout, LayoutQuestion(asked)))
        return self._layouts[asked]

    def _expectations(
        self, case: Case, implementation: str, shards: list[Shard], predictions: Future[Predictions] | None
    ) -> Expectations:
        """By the table of `checks/expectation.py`."""
        match TABLE[case.tolerance].against:
            case "itself":
                return from_itself(case, shards)
            case "twin":
                return from_twin(case, self._run_twin(case.unsharded_twin(), implementation))
        return from_oracle(case, predictions.result() if predictions else {})

    def _run_twin(self, twin: Case, implementation: str) -> list[Shard]:
        """What an unsharded case gives: run once for all that compare with it."""
        if (twin, implementation) not in self._twins:
            (answer,) = self._run_implementation(twin, implementation)
            if answer.refused:
                raise CaseFailed(f"unsharded, which link 2 compares with: {answer.refused}")
            self._twins[twin, implementation] = answer.shards
        return self._twins[twin, implementation]


def compare(
    shards: list[Shard], expectations: Expectations, held_by: HeldBy | None = None, *, gives: tuple[str, ...] = ()
) -> list[Check]:
    """Each shard against its slice of the expectation; then that nothing is missing, or held too often."""
    checks = [check_shard(shard, expectations[shard.key]) for shard in shards if shard.key in expectations]
    return [*checks, *missing_elements(shards, expectations, held_by, gives=gives), *frozen_gradients(shards)]


def status_of(checks: list[Check]) -> Status:
    """`vacuous` where all passed and none could have failed, but those that say nothing of what was computed."""
    if not all(check.passed for check in checks):
        return "failed"
    return "passed" if any(not check.vacuous and group_of(check) not in ASIDE for check in checks) else "vacuous"


def _may_be_whole(case: Case) -> bool:
    """What is merged, read from files or given by a whole forward lies on as many ranks as the implementation likes."""
    return isinstance(case, MergeCase | ExchangeCase | NeutralCase)


def _has_layout(case: Case) -> TypeGuard[TrainCase | StartCase]:
    return isinstance(case, TrainCase | StartCase) and case.strategy != UNSHARDED


def layout_case(case: TrainCase | StartCase) -> TrainCase:
    """The case less what no layout depends on, so that one answer serves many."""
    kept = ("strategy", "world", "layers", "rank", "base", "bias", "replicas")
    stepped = ("method", "units", "param_dtype", "experts") if isinstance(case, TrainCase) else ()
    return TrainCase(link="shards", **{name: getattr(case, name) for name in (*kept, *stepped)})


def limit_seconds(case: Case) -> float:
    """How long a case may take on one side before it counts as hung: far above what it needs."""
    return 120.0 + 60.0 * (case.blocks if isinstance(case, NetworkCase | OffsetCase) else 0)
