"""What a run shows and keeps: a line and a record for each step, a bar on a terminal, TensorBoard where asked for.

run.json       the options, as `--config` reads them
metrics.jsonl  {"step", "loss", "norm", "lr", "tokens", "seconds", "memory_bytes"} or {"step", "evaluation_loss"}
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from torch_impl.errors import OptionError
from torch_impl.memory import peak_memory
from torch_impl.training.options import TrainOptions

_MIB = 2**20


class Report:
    """Rank 0's; on any other rank it does nothing."""

    def __init__(self, options: TrainOptions, *, rank: int) -> None:
        self.options, self.speaks = options, rank == 0
        self._metrics: Any = None
        self._board: Any = None
        self._bar: Any = None

    def begin(self, step: int) -> None:
        """Open the files; records after `step` are of a run that was cut off, and dropped.

        Raises:
            OptionError: the output directory can't be written, or TensorBoard isn't there.
        """
        if not self.speaks:
            return
        out = self.options.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            aside = out / ".run.json"
            aside.write_text(json.dumps(self.options.to_json(), indent=1) + "\n")
            aside.replace(out / "run.json")
            self._metrics = (out / "metrics.jsonl").open("a", buffering=1)
            self._metrics.truncate(_bytes_until(out / "metrics.jsonl", step) if step else 0)
        except OSError as problem:
            raise OptionError(f"--out {out} can't be written: {problem}", hint="give a writable directory") from None
        if self.options.tensorboard:
            self._board = _board(out)
        if sys.stderr.isatty():
            from rich.progress import Progress  # noqa: PLC0415 - only on a terminal

            self._bar = Progress()
            self._task = self._bar.add_task("steps", total=self.options.steps, completed=step)
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for held, end in ((self._bar, "stop"), (self._board, "close"), (self._metrics, "close")):
            if held is not None:
                with suppress(OSError):  # the disk is full: what ends the run says so
                    getattr(held, end)()

    def say(self, line: str) -> None:
        """One line on rank 0."""
        if self.speaks:
            if self._bar is not None:
                self._bar.console.print(line)
            else:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()

    def step(self, step: int, values: dict[str, float], *, device: torch.device) -> None:
        """Show and keep one step."""
        if not self.speaks:
            return
        memory = peak_memory(device)
        self.say(
            f"step {step}/{self.options.steps}  loss {values['loss']:.4f}  norm {values['norm']:.4f}  "
            f"lr {values['lr']:.2e}  {values['tokens'] / values['seconds']:.0f} tokens/s  {memory / _MIB:.0f} MiB"
        )
        self._keep({"step": step, **values, "memory_bytes": memory})
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def evaluation(self, step: int, loss: float) -> None:
        """Show and keep one evaluation."""
        self.say(f"step {step}  evaluation loss {loss:.4f}")
        self._keep({"step": step, "evaluation_loss": loss})

    def _keep(self, record: dict[str, float]) -> None:
        """One record; a full disk stops checkpoints with an error, not these."""
        if self._metrics is not None:
            with suppress(OSError):
                self._metrics.write(json.dumps(record) + "\n")
        if self._board is not None:
            with suppress(OSError):
                for name, value in record.items():
                    self._board.add_scalar(name, value, record["step"])


def _bytes_until(path: Path, step: int) -> int:
    """How far the records up to a step reach; a line cut off by a crash ends them."""
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        size += len(line)
    return size


def _board(out: Path) -> Any:
    """TensorBoard's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError:
        raise OptionError("--tensorboard needs a package", hint="pip install tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"))
