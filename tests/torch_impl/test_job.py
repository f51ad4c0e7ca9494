"""A run's processes end as they should when nothing has gone wrong."""

import subprocess
import sys

ENDING = """
import os, socket, threading
from torch_impl.training import job, phases
phases._POLL_SECONDS = 0.0  # the watchdog is inside the launcher's store nearly all the time
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
with job.joined(job.seat(), phase_timeout=60.0) as run:
    run.begin("step 1")
print([thread.name for thread in threading.enumerate()])
"""


def test_a_run_that_has_ended_leaves_no_watchdog_to_abort_it() -> None:
    """Python kills daemon threads at its end; one that is inside the store takes the process along (SIGABRT)."""
    command = [sys.executable, "-c", ENDING]

    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own words

    assert (done.returncode, done.stdout.strip()) == (0, "['MainThread']")
