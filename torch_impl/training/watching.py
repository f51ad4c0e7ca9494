"""`watched`: no loop over ranks, of this package or anybody's, waits for ever.

A rank that has fewer batches than another leaves its loop, and the other waits for it in a collective until the process
group's own limit, half an hour by default. Here each step has a limit; past it every rank that still runs prints where
it stands, who has left and who doesn't answer are named, and all end with status `EXPIRED`.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch import distributed

from torch_impl.errors import OptionError
from torch_impl.training.phases import Phases

_ANSWER = timedelta(seconds=10)
_loops = itertools.count()  # alike on all ranks, as collectives are: keys of one loop are not another's


@contextmanager
def watched(*, seconds: float = 30.0) -> Iterator[Callable[[str], None]]:
    """Watch the body, a loop in which ranks wait for each other; every rank of the default group enters it.

    ```
    with watched(seconds=60) as at:
        for number, batch in enumerate(batches):
            at(f"step {number}")
            ...
    ```

    Args:
        seconds: how long the body may take from one call of what is given to the next, and before the first; the
            slowest step on the slowest rank, with room.

    Yields:
        What names the step that begins.

    Raises:
        OptionError: `seconds` is no positive number.
    """
    if not 0 < seconds < float("inf"):
        raise OptionError(f"seconds={seconds} is no positive number", hint="use 30, or more than a step takes")
    alone = not distributed.is_initialized() or distributed.get_world_size() == 1
    phases = Phases(
        rank=0 if alone else distributed.get_rank(),
        world_size=1 if alone else distributed.get_world_size(),
        limit=seconds,
        limit_name="its limit of {:g}",
        store=None if alone else _store(),
    )
    phases.begin("before its first step")
    phases.watch()
    try:
        yield phases.begin
        phases.leave()
    finally:
        phases.end_watch()


def _store() -> distributed.Store:
    """The process group's own store, by a connection of its own: the main thread may be waiting on the other."""
    store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - torch gives it no other name
    with suppress(RuntimeError, AttributeError):
        store = store.clone()
    store = distributed.PrefixStore(f"dora/watched/{next(_loops)}", store)
    store.set_timeout(_ANSWER)
    return store
