"""The JAX process: answers the oracle's questions and runs the JAX implementations, on virtual devices, in float64."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.case import (
    Case,
    CheckpointCase,
    DecodeCase,
    ExchangeCase,
    MergeCase,
    NetworkCase,
    RefuseCase,
    StartCase,
    SteppedCase,
    TrainCase,
)
from parity.job import Job, Place, RankAnswer, declared
from parity.oracle.prediction import LayoutQuestion, Layouts, Predictions
from parity.workers.answers import pack_answers, pack_trusted, unpack_answers, unpack_trusted
from parity.workers.child import life, serve
from parity.workers.group import Seat, Workers
from parity.workers.memory import GIB, give_back, resident
from parity.workers.ran import Ran
from parity.workers.refusing import what_is_said, why_refused
from parity.workers.wire import Packed

DEVICES = 8
"""Virtual CPU devices: the largest world of a sharded JAX case."""
_MOST_KEPT = 2 * GIB
"""Above it a network is not begun before all programs that were compiled for stacks are dropped."""
_LAYOUT_SECONDS = 60.0
"""A layout is arithmetic on a few integers."""

Offsets = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Question:
    """What should this case give?"""

    case: Case
    offsets: Offsets = ()
    """What each quantised layer's scales were shifted by: data, not for the oracle to recompute (Q4)."""


@dataclass(frozen=True)
class RanQuestion:
    """Which functions of `ref` have run?"""


class Oracle:
    """Asks the JAX process. Answers are kept, since many cases share their mathematics."""

    def __init__(self, *, model: Path | None, cache: Path, notes_calls: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        options = {"model": model, "cache": cache, "notes_calls": notes_calls}
        self._workers = Workers(jax_main, 1, context=context, options=options)
        self._answers: dict[Question, Predictions] = {}

    def predict(self, case: Case, offsets: Offsets = (), *, seconds: float) -> Predictions:
        """Predictions for a case; `offsets` as `Question` has them.

        Raises:
            CaseFailed: the process raised, died or took too long.
        """
        question = Question(mathematics(case), offsets)
        if question not in self._answers:
            self._answers[question] = self._workers.call(question, unpack_trusted, seconds=seconds)[0]
        return self._answers[question]

    def run(self, job: Job, *, seconds: float) -> list[RankAnswer]:
        """Run a JAX implementation; its answers come as from ranks."""
        return self._workers.call(job, unpack_answers, seconds=seconds)[0]

    def layout(self, question: LayoutQuestion) -> Layouts:
        """Which part of each parameter each rank ought to hold."""
        return self._workers.call(question, unpack_trusted, seconds=_LAYOUT_SECONDS)[0]

    def ran(self) -> list[str]:
        """The functions of `ref` that have run there so far, where calls are noted."""
        return self._workers.call(RanQuestion(), unpack_trusted, seconds=_LAYOUT_SECONDS)[0]

    def close(self) -> None:
        """End the process for good."""
        self._workers.close()


def mathematics(case: Case) -> Case:
    """The case less what its answer cannot depend on; a subject is kept where its route has a bound of its own."""
    subject = case.subject if case.subject in {"peft", "differences"} else "torch_impl"
    dealt: dict[str, int] = {"world": case.input_world}  # tensor ranks see one batch
    if case.is_exact:  # no bound, so nothing depends on how the tokens are dealt
        dealt = {"world": 1, **({"accumulate": 1} if isinstance(case, SteppedCase) else {})}
    return case.undisturbed(subject=subject, **dealt)


@life
def jax_main(seat: Seat) -> None:
    """The process's life."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax  # noqa: PLC0415 - only this process loads jax

    jax.config.update("jax_enable_x64", val=True)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_compilation_cache_dir", str(seat.options["cache"] / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    ran = Ran()
    if seat.options["notes_calls"]:
        ran.begin()
    serve(seat, lambda asked: _packed(asked, seat.options["model"], ran))


def _packed(asked: Any, model: Path | None, ran: Ran) -> Packed:
    """What implementations give crosses field by field, as from ranks; what the oracle says is trusted."""
    if isinstance(asked, RanQuestion):
        return pack_trusted(ran.names())
    return pack_answers(_run(asked, model)) if isinstance(asked, Job) else pack_trusted(_answer(asked, model))


def _answer(asked: Any, model: Path | None) -> Any:
    if isinstance(asked, LayoutQuestion):
        from parity.oracle.layout import predict_layout  # noqa: PLC0415 - each question loads what it needs

        return predict_layout(asked)
    return _predict(asked, model)


def _predict(question: Question, model: Path | None) -> Predictions:
    """By the kind of case; each loads what it needs."""
    match question.case:
        case DecodeCase() as case:
            from parity.oracle.codec import predict_codec  # noqa: PLC0415

            return predict_codec(case)
        case NetworkCase() as case:
            import jax  # noqa: PLC0415

            from parity.oracle.network import predict_network  # noqa: PLC0415

            if resident() > _MOST_KEPT:
                jax.clear_caches()
            give_back()
            predictions = predict_network(case, model, dict(question.offsets))
            give_back()
            return predictions
        case MergeCase() | ExchangeCase() as case:
            return _predict_files(case)
        case StartCase() as case:
            from parity.oracle.stack import predict_start  # noqa: PLC0415

            return predict_start(case)
        case TrainCase() as case:
            from parity.oracle.stack import predict_stack  # noqa: PLC0415

            return predict_stack(case)
    raise TypeError(f"the oracle has no answer to a {type(question.case).__name__}")


def _predict_files(case: MergeCase | ExchangeCase) -> Predictions:
    from parity.oracle import files  # noqa: PLC0415

    if isinstance(case, MergeCase):
        return files.predict_merged(case)
    return files.predict_checkpoint(case) if isinstance(case, CheckpointCase) else files.predict_adapters(case)


def _run(job: Job, model: Path | None) -> list[RankAnswer]:
    """One answer a virtual rank."""
    from parity.implementations.registry import resolve  # noqa: PLC0415

    start = time.monotonic()
    implementation = resolve(job.implementation)
    refused = why_refused(implementation, job.case)
    if refused:
        return [RankAnswer([], time.monotonic() - start, refused)]
    if isinstance(job.case, RefuseCase):
        return [RankAnswer([], time.monotonic() - start, said=what_is_said(implementation, job.case))]
    shards = list(implementation.run(job.case, Place(0, job.case.world, "cpu", model, job.folder)))
    seconds = time.monotonic() - start
    ranks = range(1 if job.folder else job.case.world)  # files are read whole
    about = declared(implementation)
    return [RankAnswer([shard for shard in shards if shard.rank == rank], seconds, **about) for rank in ranks]
