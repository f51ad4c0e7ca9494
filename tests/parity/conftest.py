"""What the tests of the suite share: where ranks find the fakes, a pipeline, and the command line as a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # ranks import the fakes by module name

from parity.pipeline import Pipeline  # noqa: E402 - the path comes first

COMMAND = Path(sys.executable).with_name("dora-parity")


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

    def run(*arguments, **options):
        command = [COMMAND, *map(str, arguments)]
        settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 100}
        return subprocess.run(command, check=False, **(settings | options))  # noqa: S603 - our own command

    return run
