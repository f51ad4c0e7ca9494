"""What a result was made with is in the result; the recorded versions are those that `make` installs."""

from pathlib import Path

import pytest

from parity.report.environment import RECORDED, describe, deviations

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_versions_are_those_that_are_installed(name):
    """The version that the bitwise claims were made with is the one in constraints.txt."""
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)

    assert pinned[name] == RECORDED[name]


def test_another_version_is_told():
    """A package at another version than the recorded one is named with both; a build's local suffix is none."""
    found = RECORDED | {"torch": RECORDED["torch"] + "+cpu", "jax": "0.0.1"}

    assert deviations(found) == [f"jax 0.0.1 (recorded: {RECORDED['jax']})"]


def test_the_environment_says_the_device():
    """Whether it ran on CPU or CUDA is part of the result."""
    assert describe("cuda")["device"] == "cuda"
