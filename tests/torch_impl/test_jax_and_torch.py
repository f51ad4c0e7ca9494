"""The two fine-tunes are one: JAX over four devices and PyTorch give one loss curve, and a bug would part them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fine_tunes import Trace
from jax_and_torch import BUGS, Comparison, faults, shortfalls

from parity.oracle.sensitivity import FACTOR

TOOL = Path(__file__).parent / "jax_and_torch.py"
FEW = ("--layers", "2", "--steps", "8", "--sequences", "2", "--seq-len", "32", "--seeds", "2", "--controls")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """The tool on two layers of SmolLM2, bugs and picture too, in a process of its own: JAX is told of four devices."""
    picture = tmp_path_factory.mktemp("picture") / "curves.png"
    command = [sys.executable, str(TOOL), *FEW, "--picture", str(picture)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own words
    return done.returncode, done.stdout + done.stderr, picture


@pytest.mark.long
@pytest.mark.timeout(900)
def test_jax_and_torch_train_one_curve_from_the_same_bits(ran) -> None:
    """On eight batches of real text every loss and tensor of both is the float64 run's, within its own rounding."""
    status, said, picture = ran

    assert status == 0, said
    assert "14 packed weights, equal to the bit" in said
    assert "42 of 42 tensors judged" in said
    assert picture.stat().st_size > 1000


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_on_one_side_parts_the_curves(ran, bug: str) -> None:
    """The same limits fail PyTorch with the bug planted, losses and tensors both."""
    line = next(line for line in ran[1].splitlines() if bug in line)

    assert line.startswith("found: ")
    assert "losses lie off" in line
    assert "tensors of the adapter lie off" in line


def made() -> Comparison:
    """Runs that show all they should, each loss at 0.97 and each tensor at 0.25 of its limit."""
    start = {"A": np.ones(2), "m": np.ones(3)}
    exact = Trace(np.array([5.0, 4.0, 3.0]), {"A": np.full(2, 2.0), "m": np.full(3, 1.5)})
    response = Trace(np.array([1e-6, 2e-6, 3e-6]), {"A": 1e-5, "m": 1e-5})
    run = Trace(
        exact.losses + np.array([31e-6, -62e-6, 93e-6]), {"A": exact.adapter["A"] + [0, 8e-5], "m": np.full(3, 1.5)}
    )
    return Comparison(exact, response, {"JAX": run, "PyTorch": run}, start)


def with_torch(**changed) -> Comparison:
    """The same with PyTorch's run changed."""
    found = made()
    return replace(found, runs=found.runs | {"PyTorch": replace(found.runs["PyTorch"], **changed)})


def with_exact(**changed) -> Comparison:
    """The same with the truth changed, and both runs with it."""
    found = made()
    exact = replace(found.exact, **changed)
    return replace(found, exact=exact, runs=dict.fromkeys(found.runs, exact))


FALLS_SHORT = {
    "bits": (lambda: replace(made(), base=("q_proj: not the same bits: .packed",)), "not the same bits"),
    "a-loss": (lambda: with_torch(losses=np.array([5, 4 + 66e-6, 3])), "1 losses lie off, first at step 2"),
    "no-number": (lambda: with_torch(losses=np.array([5, 4, np.nan])), "1 losses lie off, first at step 3"),
    "a-tensor": (
        lambda: with_torch(adapter={"A": np.full(2, 2.0), "m": np.array([1.5, 1.5, 1.5004])}),
        "1 of 2 tensors of the adapter lie off, m most",
    ),
    "no-number-in-a-tensor": (
        lambda: with_torch(adapter={"A": np.array([2.0, np.nan]), "m": np.full(3, 1.5)}),
        "1 of 2 tensors of the adapter lie off, A most",
    ),
    "no-learning": (lambda: with_exact(losses=np.array([5.0, 5.0, 5.0])), "the loss doesn't fall"),
    "nothing-judged": (lambda: with_exact(adapter=made().start), "no tensor of the adapter can be judged"),
}


def test_good_runs_fall_short_of_nothing() -> None:
    """The control of the controls."""
    assert list(shortfalls(made())) == []


@pytest.mark.parametrize("name", FALLS_SHORT)
def test_each_way_to_fall_short_is_said(name: str) -> None:
    """One loss, one tensor or one bit is enough."""
    make, words = FALLS_SHORT[name]

    assert any(words in text for text in shortfalls(make()))


def test_the_limit_is_the_suite_s_multiple_of_the_response() -> None:
    """A loss just inside 32 times the response is let pass, one just outside is not."""
    found = made()
    limits = FACTOR * found.response.losses

    inside, outside = (replace(found.exact, losses=found.exact.losses + share * limits) for share in (0.999, 1.001))

    assert list(faults(found, inside)) == []
    assert "3 losses lie off, first at step 1" in next(faults(found, outside))
