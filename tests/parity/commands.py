"""The command line: in a process of its own, as a user starts it, or in this one, where a process shows no more."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from parity.commands.cli import main

COMMAND = Path(sys.executable).with_name("dora-parity")


def run_command(arguments, *, folder, environment):
    """Run it to its end in that folder."""
    settings = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 100}
    return subprocess.run([COMMAND, *map(str, arguments)], check=False, **settings)  # noqa: S603 - our own command


def call_command(arguments, *, capfd):
    """Call its entry point; what a process would have ended with."""
    words = [str(COMMAND), *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    return subprocess.CompletedProcess(words, ended.value.code or 0, said.out, said.err)
