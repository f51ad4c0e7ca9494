"""What the tests of the suite share: where ranks find the fakes, a pipeline, and the command line."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # ranks import the fakes by module name

from commands import call_command, run_command  # noqa: E402 - the path comes first

from parity.pipeline import Pipeline  # noqa: E402 - the path comes first


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline whose pools stay up for a file's tests."""
    with Pipeline(cache=tmp_path_factory.mktemp("cache")) as running:
        yield running


@pytest.fixture(scope="session")
def environment():
    """The variables of a command that finds the fakes."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


@pytest.fixture
def dora_parity(environment, tmp_path):
    """Run the command in an empty folder, as a user does: `dora_parity("list", "-k", "thin")`."""

    def run(*arguments, **variables):
        return run_command(arguments, folder=tmp_path, environment=environment | variables)

    return run


@pytest.fixture
def called(tmp_path, monkeypatch, capfd):
    """Call the command in this process, in an empty folder: for what ends before anything runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: call_command(arguments, capfd=capfd)
