"""However a run ends, no process outlives it; interrupted, it says so and keeps what it found."""

import contextlib
import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from commands import COMMAND

from parity.folders import sweep_leftovers

pytestmark = pytest.mark.distributed

KEEP = "fsdp2-w2/thin and plain and (one-hot and float32-float32 or lattice and nf4)"
"""Two cases: `SleepsOnNf4` passes the first and hangs in the second."""
LATTICE = "stack/lattice/torch_impl/fsdp2-w2/uneven/float32-float32/plain"
"""A case on two ranks that is compared with the reference, so that no unsharded one comes along."""
START_SECONDS = 60.0
END_SECONDS = 25.0
"""How long the last process may take to see that its parent is gone: far less, on an idle machine."""


def wait_for(condition, what):
    """Poll until it is true."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)


def running(processes):
    """Those that still run; one that nobody has waited for yet does not."""
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def left_over(processes):
    """What still runs when the time is up, in words."""
    deadline = time.monotonic() + END_SECONDS
    while running(processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [" ".join(process.cmdline()) for process in running(processes)]


def offspring(run):
    """The process itself and all below it."""
    family = psutil.Process(run.pid)
    return [family, *family.children(recursive=True)]


@pytest.fixture
def temporary(tmp_path):
    """Where a command's temporary folders lie: too deep for a socket's path, as users' may be."""
    folder = tmp_path / ("temporary-" * 10)
    folder.mkdir()
    return folder


@pytest.fixture
def start(environment, tmp_path, temporary):
    """Start a command in a session of its own, as a terminal's foreground job; whatever is left is killed."""
    started = []
    variables = environment | {"TMPDIR": str(temporary)}

    def begin(*arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        run = subprocess.Popen(  # noqa: S603 - our own command
            [COMMAND, *map(str, arguments)], cwd=tmp_path, env=variables, start_new_session=True, **pipes
        )
        started.append(run)
        return run

    yield begin
    for run in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.fixture
def hanging(start, tmp_path):
    """A run whose two ranks sleep in its second case, and all its processes."""
    run = start("run", "-k", KEEP, "--impl", "fakes:SleepsOnNf4", "--json", "results.json")
    wait_for(lambda: len(list(tmp_path.glob("asleep-2-*"))) == 2, "sleep")
    wait_for(lambda: any("spawn_main" in " ".join(p.cmdline()) for p in offspring(run)), "the JAX process")
    return run, offspring(run)


@pytest.mark.long
def test_ranks_end_with_a_killed_parent(hanging):
    """When the run is killed, its ranks, the fork server and the JAX process end by themselves."""
    run, family = hanging

    run.kill()

    assert len(family) >= 5
    assert left_over(family) == []


SIGNALS = [
    pytest.param(signal.SIGINT, (130, "interrupted"), id="Ctrl-C"),
    pytest.param(signal.SIGTERM, (143, "terminated"), id="SIGTERM", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("number", "ending"), SIGNALS)
def test_an_interrupted_run_ends_everything(hanging, tmp_path, temporary, number, ending):
    """Ctrl-C or SIGTERM amid a hanging case: a status of its own, one line, nothing left, what was found kept."""
    run, family = hanging

    os.killpg(run.pid, number)
    _, said = run.communicate(timeout=END_SECONDS)

    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (run.returncode, said) == (ending[0], f"dora-parity: {ending[1]}; every rank has been ended\n")
    assert left_over(family) == []
    assert kept["complete"] is False
    assert [case["status"] for case in kept["cases"] if "one-hot" in case["id"]] == ["passed"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".json") == ["results.json"]
    assert list(temporary.iterdir()) == []


@pytest.mark.long
def test_two_signals_are_as_one(hanging, temporary):
    """A second SIGTERM does not stop what the first one tidies up."""
    run, family = hanging

    run.terminate()
    time.sleep(0.1)
    run.terminate()
    run.communicate(timeout=END_SECONDS)

    assert run.returncode == 143
    assert left_over(family) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long), pytest.param(signal.SIGKILL, id="SIGKILL")],
)
def test_what_ranks_started_ends_with_the_run(start, number):
    """A program that a rank left behind in a session of its own ends with the run, however that ends."""
    run = start("run", "-k", LATTICE, "--impl", "weird:StartsDaemonAndSleeps")
    wait_for(lambda: sum(process.name() == "sleep" for process in offspring(run)) == 2, "a program of each rank")
    family = offspring(run)

    run.send_signal(number)

    assert left_over(family) == []


def test_a_whole_run_leaves_nothing(start, temporary):
    """Programs that ranks left behind are gone when the command is, and so are its folders; the judge alone speaks."""
    run = start("run", "-k", LATTICE, "--impl", "weird:StartsDaemon", "--impl", "weird:PrintsVerdict")
    wait_for(lambda: any(process.name() == "sleep" for process in offspring(run)), "a program of a rank")
    family = offspring(run)
    heard, _ = run.communicate(timeout=START_SECONDS)

    assert left_over(family) == []
    assert list(temporary.iterdir()) == []
    assert heard.count("HOLDS") == 1


def test_the_next_run_sweeps_what_a_killed_one_left(temporary, monkeypatch):
    """A folder whose owner is dead goes; those of the living, and whatever bears another name, stay."""
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    dead = subprocess.Popen(["true"])  # noqa: S607 - any program will do
    dead.wait()
    stay = [f"dora-parity-{os.getpid()}-abc", "dora-parity-1-abc", "dora-parity-abc", f"other-{dead.pid}-abc"]
    for name in (*stay, f"dora-parity-{dead.pid}-abc"):
        (temporary / name / "inner").mkdir(parents=True)
    (temporary / f"dora-parity-{dead.pid}-file").touch()
    (temporary / f"dora-parity-{dead.pid}-link").symlink_to(temporary / stay[0])

    sweep_leftovers()

    left = {path.name for path in temporary.iterdir()}
    assert left == {*stay, f"dora-parity-{dead.pid}-file", f"dora-parity-{dead.pid}-link"}


@pytest.mark.parametrize(
    "seconds", [pytest.param(s, marks=pytest.mark.long) for s in (0.1, 0.2, 0.5, 1.0)] + [0.0, 1.5]
)
def test_an_interrupt_at_the_start_is_one_line(start, seconds):
    """Ctrl-C while the fork server and the JAX process still import what they need: no traceback from any of them."""
    run = start("run", "-k", KEEP, "--impl", "fakes:SleepsOnNf4")
    wait_for(lambda: len(offspring(run)) > 3, "a worker")
    time.sleep(seconds)
    family = offspring(run)

    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=END_SECONDS)

    assert run.returncode == 130
    assert said == "dora-parity: interrupted; every rank has been ended\n"
    assert left_over(family) == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["list"], id="list"),
        pytest.param(["run", "-k", LATTICE, "--impl", "fakes:Honest"], id="run"),
    ],
)
def test_a_reader_that_leaves_is_no_proof(start, arguments):
    """A command whose output nobody reads to its end, as under `| head`, does not exit 0, and leaves no traceback."""
    run = start(*arguments)
    run.stdout.close()
    run.stdout = None
    _, said = run.communicate(timeout=START_SECONDS)

    assert run.returncode not in {0, 2}
    assert "Traceback" not in said
