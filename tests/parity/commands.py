"""The command line as a process of its own, as a user starts it."""

import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("dora-parity")


def run_command(arguments, *, folder, environment):
    """Run it to its end in that folder."""
    settings = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 100}
    return subprocess.run([COMMAND, *map(str, arguments)], check=False, **settings)  # noqa: S603 - our own command
