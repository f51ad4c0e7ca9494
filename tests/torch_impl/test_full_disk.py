"""Under torchrun: a disk that fills up, and one that may not be written; real ones, mounted for the test."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import watch
from small import write_model, write_text

from torch_impl.files import checkpoint
from torch_impl.files import checkpoint_disk as checkpoint_files

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(240)]


def _mount(*words: str) -> None:
    try:
        subprocess.run(["mount", *words], check=True, capture_output=True)  # noqa: S603, S607 - our own words
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"nothing can be mounted here: {problem}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Two MiB, which a few checkpoints fill."""
    place = tmp_path / "disk"
    place.mkdir()
    _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place))
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)  # noqa: S603, S607 - likewise


@pytest.fixture
def words(tmp_path: Path, disk: Path) -> list[str]:
    """A long run that saves at every step."""
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    files = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--out", str(disk / "out")]
    return [*files, "--steps", "100000", "--save-every", "1", "--seq-len", "24"]


def _ends_in_one_line(words: list[str], log: Path, *, until: str, act: Callable[..., int]) -> str:
    """Run; the only error line, after an ending in time, non-zero and without a traceback of ours."""
    ending = watch(words, until=until, act=act)(log, world=2)
    assert ending.seconds < 30
    assert ending.status != 0
    assert ending.orphans == []
    assert "torch_impl/training/train.py" not in "\n".join(ending.lines)
    (line,) = [line for line in ending.lines if line.startswith("error: ")]
    return line


def _is_whole(folder: Path) -> bool:
    """Whether the newest checkpoint reads, and no half of one is left."""
    place = checkpoint_files.newest(folder)
    assert place is not None
    assert checkpoint.read_state(place)[1].step == int(place.name.removeprefix("step-"))
    return not list(folder.glob(".*"))


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, disk: Path, words: list[str]) -> None:
    """Checkpoints fill the disk: one line says so, and the newest that was written is whole."""
    line = _ends_in_one_line(words, tmp_path / "log", until="error: ", act=lambda *_: 0)

    assert "no checkpoint can be written" in line
    assert "No space left on device" in line
    assert _is_whole(disk / "out" / "checkpoints")


def test_a_read_only_place_is_refused_before_anything_loads(tmp_path: Path, disk: Path, words: list[str]) -> None:
    """One line that names it, and no phase has begun."""
    _mount("-o", "remount,ro", str(disk))

    line = _ends_in_one_line(words, tmp_path / "log", until="error: ", act=lambda *_: 0)

    assert "can't be written" in line
    assert "phase text" not in (tmp_path / "log").read_text()
