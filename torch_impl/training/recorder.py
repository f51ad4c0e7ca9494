"""A rank's flight recorder: a small process that outlives it, and says last which rank was lost and where.

Neither torchrun nor the surviving ranks know reliably who died first, and torchrun's own summary comes after theirs. So
each rank starts one recorder, in a session of its own, and tells it through a pipe what it does. Where the pipe ends
without a farewell the rank was killed: the recorder waits until the launcher has ended, prints one line, and ends. It
never outlives rank and launcher by more than `PATIENCE` seconds, loads no torch, and reads nothing but that pipe.

    phase TEXT        what the rank does now
    checkpoint PATH   the newest whole checkpoint
    end               an orderly end, or one whose reason the rank has printed itself
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

PATIENCE = 40.0
"""torchrun gives its workers 30 s after SIGTERM before it kills them."""


class Recorder:
    """The rank's end of the pipe."""

    def __init__(self, *, rank: int, host: str, launcher: int, waits: bool, speaks_for_launcher: bool) -> None:
        arguments = (rank, host, os.getpid(), launcher, int(waits), int(speaks_for_launcher))
        self._child = subprocess.Popen(  # noqa: S603 - our own file, with numbers and a host's name
            [sys.executable, "-I", "-S", __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def tell(self, line: str) -> None:
        """Pass one line on; a recorder that is gone is no reason to stop training."""
        pipe = self._child.stdin
        if pipe is None or pipe.closed:
            return
        try:
            pipe.write(line.replace("\n", " ").encode() + b"\n")
            pipe.flush()
        except OSError:
            pipe.close()

    def end(self) -> None:
        """Say farewell, and wait for the recorder to be gone."""
        self.tell("end")
        pipe = self._child.stdin
        if pipe is not None and not pipe.closed:
            pipe.close()
        try:
            self._child.wait(2.0)
        except subprocess.TimeoutExpired:
            self._child.kill()


def _heard(lines: Iterable[bytes]) -> tuple[bool, str, str]:
    """Whether the rank ended in order; its last phase; its last checkpoint."""
    phase, checkpoint = "its start", ""
    for line in lines:
        word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
        if word == "end":
            return True, phase, checkpoint
        if word == "phase":
            phase = rest
        elif word == "checkpoint":
            checkpoint = rest
    return False, phase, checkpoint


def _gone(process: int, *, seconds: float) -> bool:
    """Whether a process has ended within so many seconds (a zombie has)."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    except OSError:  # no pidfd here: ask by signal
        deadline = time.monotonic() + seconds
        while os.path.exists(f"/proc/{process}") and time.monotonic() < deadline:  # noqa: PTH110 - no pathlib here
            time.sleep(0.05)
        return not os.path.exists(f"/proc/{process}")  # noqa: PTH110
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _watch(arguments: list[str]) -> int:
    """The recorder's life."""
    rank, host, process = arguments[:3]
    launcher, waits, speaks_for_launcher = (int(text) for text in arguments[3:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    in_order, phase, checkpoint = _heard(sys.stdin.buffer)
    if in_order:
        return 0
    kept = f"the last whole checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    line = f"rank {rank} (pid {process} on {host}) was lost in {phase}: it was killed, or it crashed; {kept}"
    if waits and _gone(launcher, seconds=0.0):
        if not speaks_for_launcher:
            return 0
        line = f"the launcher (pid {launcher} on {host}) was lost, and its ranks with it, in {phase}; {kept}"
    elif waits:
        _gone(launcher, seconds=PATIENCE)
    sys.stderr.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_watch(sys.argv[1:]))
