"""The README's examples do what the README says of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

README = Path(__file__).parents[1] / "README.md"
CASES = "none and uneven/float32-float32 and not start"


def example(name: str = "my_dora.py") -> str:
    """The Python source after the mark `file NAME`."""
    mark = rf"<!-- file {re.escape(name)} -->\n```python\n(.*?)```"
    found = re.search(mark, README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found.group(1)


def run(source: str, folder: Path, *, keep: str = CASES) -> subprocess.CompletedProcess[str]:
    """Put the example to the proof."""
    (folder / "my_dora.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "parity", "run", "--impl", "my_dora:MyDora", "-k", keep]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, check=False, **options)  # noqa: S603 - our own command


@pytest.mark.distributed
def test_example_with_the_bug_is_told_what_it_looks_like(tmp_path):
    """The undetached norm of the README's example fails, by name."""
    result = run(example(), tmp_path)

    assert result.returncode == 1
    assert "looks like NormNotDetached" in result.stdout


@pytest.mark.distributed
def test_example_without_the_bug_holds(tmp_path):
    """With the norm detached, as the README's comment says, it holds; its units are its own, and so is their number."""
    mended = example().replace(".to(V.dtype)  # D5 wants .detach() here", ".to(V.dtype).detach()")

    result = run(mended, tmp_path, keep=f"({CASES}) or counted and fsdp2-w2")

    assert result.returncode == 0, result.stdout


def fine_tune(folder: Path, *words: str) -> list[str]:
    """Run the fine-tune in JAX; the lines that it prints."""
    (folder / "fine_tune.py").write_text(example("fine_tune.py"), encoding="utf-8")
    command = [sys.executable, "fine_tune.py", *words]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, check=False, **options)  # noqa: S603 - our own command
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_fine_tune_in_jax_learns_and_leaves_an_adapter(tmp_path):
    """On two layers the loss falls with each step, and the files hold an adapter for each of the fourteen layers."""
    losses = [float(line.rpartition(" ")[2]) for line in fine_tune(tmp_path, "3", "2")]

    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "numpy") as stream:
        assert len(stream.keys()) == 14 * 3


@pytest.mark.long
def test_fine_tune_in_jax_prints_what_the_readme_shows(tmp_path):
    """The whole model gives the README's losses, to the last digit but one."""
    shown = re.search(
        r"<!-- output of python fine_tune.py 5 30 -->\n```\n(.*?)```", README.read_text("utf-8"), re.DOTALL
    )
    assert shown

    said = fine_tune(tmp_path, "5", "30")

    want = [float(line.rpartition(" ")[2]) for line in shown.group(1).splitlines()]
    assert [float(line.rpartition(" ")[2]) for line in said] == pytest.approx(want, abs=1e-3)
