"""The README's example of a third party's implementation does what the README says of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
CASES = "none and uneven/float32-float32 and not start"


def example() -> str:
    """The Python source after the mark `file my_dora.py`."""
    found = re.search(r"<!-- file my_dora\.py -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found.group(1)


def run(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Put the example to the proof."""
    (folder / "my_dora.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "parity", "run", "--impl", "my_dora:MyDora", "-k", CASES]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 100}
    return subprocess.run(command, check=False, **options)  # noqa: S603 - our own command


@pytest.mark.distributed
@pytest.mark.slow
def test_example_with_the_bug_is_told_what_it_looks_like(tmp_path):
    """The undetached norm of the README's example fails, by name."""
    result = run(example(), tmp_path)

    assert result.returncode == 1
    assert "looks like NormNotDetached" in result.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_example_without_the_bug_holds(tmp_path):
    """With the norm detached, as the README's comment says, the example holds."""
    mended = example().replace("dim=1)  # D5 wants .detach() here", "dim=1).detach()")

    result = run(mended, tmp_path)

    assert result.returncode == 0, result.stdout
