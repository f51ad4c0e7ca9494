"""It learns: SmolLM2 on real text, {LoRA, QLoRA, DoRA, QDoRA} x {one process, fsdp1, fsdp2}, by the command itself.

    python tests/torch_impl/learning_curves.py --picture docs/it-learns.png

Every run takes the same two sequences a step: one process one after the other (`--accumulate 2`), two ranks one each.
Then nothing is left to round differently. With L = L0 + L1 the sums of two ranks' losses over the step's tokens:

    one process   g = dL0 + dL1                   added into `.grad` in turn
    two ranks     g = (2 dL0 + 2 dL1) / 2         S3: world * sum / N_total, then the mean over ranks

Doubling and halving are exact, and a sum of two terms has one order. So the tolerance is none: within a method every
loss of every step, and the adapter at the end, are equal to the bit (link 2). Between methods they must differ, but for
the first loss: B = 0 leaves the base model's output, and c = 1 (D12).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # as a script and in tests alike

from launched import command

ROOT = Path(__file__).parents[2]
METHODS = {
    "LoRA": ("--method", "lora"),
    "DoRA": ("--method", "dora"),
    "QLoRA": ("--method", "lora", "--quant", "nf4"),
    "QDoRA": ("--method", "dora", "--quant", "nf4"),
}
PLACES = {
    "one process": ("none", 0, ("--accumulate", "2")),
    "fsdp1 on 2": ("fsdp1", 2, ()),
    "fsdp2 on 2": ("fsdp2", 2, ()),
}


@dataclass(frozen=True)
class Options:
    """Train every method in every place, compare, and draw."""

    model: Path | None = None
    """A Hugging Face checkpoint; SmolLM2-135M-Instruct if not given."""
    data: Path = ROOT / "parity" / "text.txt"
    """Real text: the opening of Moby-Dick."""
    out: Path | None = None
    """Where the runs go; nowhere that lasts if not given."""
    picture: Path | None = None
    """Where to draw the curves (.png or .svg)."""
    steps: int = 24
    """Optimizer steps of each run."""
    seq_len: int = 64
    """Tokens of one sequence."""
    lr: float = 2e-3
    """AdamW's rate, constant."""


@dataclass(frozen=True)
class Run:
    """What one run left."""

    losses: tuple[float, ...]
    """Of each step."""
    adapter: Mapping[str, torch.Tensor]
    """At the end."""


def train(options: Options, method: str, place: str, out: Path) -> Run:
    """One run by the real command, under torchrun where there are two ranks."""
    strategy, world, more = PLACES[place]
    words = ["--model", str(options.model), "--data", str(options.data), "--out", str(out)]
    words += ["--strategy", strategy, *METHODS[method], *more, "--steps", str(options.steps)]
    words += ["--seq-len", str(options.seq_len), "--lr", str(options.lr), "--schedule", "constant"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun has it: another count sums in another order
    done = subprocess.run(  # noqa: S603 - our own words
        command(words, world=world), check=False, capture_output=True, text=True, env=one_thread, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"{method}, {place}: exit status {done.returncode}\n{done.stderr}")
    return read(out)


def read(out: Path) -> Run:
    """The recorded losses and the adapter of a finished run."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = tuple(record["loss"] for record in records if "loss" in record)
    return Run(losses, load_file(out / "adapter" / "adapter_model.safetensors"))


def shortfalls(runs: Mapping[tuple[str, str], Run]) -> Iterator[str]:
    """Every way in which runs by (method, place) don't show what they should."""
    first_place = next(iter(PLACES))
    for (method, place), run in runs.items():
        whole = runs[method, first_place]
        yield from (f"{method}, {place}: {text}" for text in differences(whole, run))
        half = len(run.losses) // 2
        if not sum(run.losses[half:]) < sum(run.losses[: len(run.losses) - half]):
            yield f"{method}, {place}: the loss doesn't fall: {run.losses}"
    curves = {method: runs[method, first_place].losses for method in METHODS}
    for one, other in (("LoRA", "DoRA"), ("QLoRA", "QDoRA")):
        if curves[one][0] != curves[other][0]:
            yield f"{other} doesn't start where {one} does (D12): {curves[other][0]} against {curves[one][0]}"
    if len(set(curves.values())) < len(curves):
        yield "two methods have the same curve"


def differences(whole: Run, run: Run) -> Iterator[str]:
    """Where a run isn't another one, bit for bit."""
    if len(run.losses) != len(whole.losses):
        yield f"{len(run.losses)} losses against {len(whole.losses)}"
    unequal = [step for step, (a, b) in enumerate(zip(whole.losses, run.losses, strict=False), 1) if a != b]
    if unequal:
        at = unequal[0] - 1
        yield f"{len(unequal)} losses differ, first at step {at + 1}: {run.losses[at]!r} against {whole.losses[at]!r}"
    if run.adapter.keys() != whole.adapter.keys():
        yield f"the adapter holds other tensors: {sorted(run.adapter.keys() ^ whole.adapter.keys())[:3]}"
        return
    names = [name for name, tensor in whole.adapter.items() if not torch.equal(tensor, run.adapter[name])]
    if names:
        yield f"{len(names)} of {len(whole.adapter)} tensors of the adapter differ, {names[0]} first"


def draw(runs: Mapping[tuple[str, str], Run], picture: Path) -> None:
    """The curves: a line for one process, a mark in a shape of its own for each sharded strategy."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only where something is drawn

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    marks = dict(zip(PLACES, ({"linestyle": "-"}, {"marker": "o"}, {"marker": "x"}), strict=True))
    for axes, title, methods in (
        (left, "float32 base", ("LoRA", "DoRA")),
        (right, "NF4 base", ("QLoRA", "QDoRA")),
    ):
        for method, colour in zip(methods, ("tab:orange", "tab:blue"), strict=True):
            for place, mark in marks.items():
                losses = runs[method, place].losses
                style = {"linestyle": "", "fillstyle": "none", "markersize": 5} | mark
                axes.plot(range(1, len(losses) + 1), losses, color=colour, label=f"{method}, {place}", **style)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("loss, nat a token")
    figure.savefig(picture, dpi=100)


def table(runs: Mapping[tuple[str, str], Run]) -> Iterator[str]:
    """A line a method: where its loss begins and ends."""
    for method in METHODS:
        losses = runs[method, next(iter(PLACES))].losses
        yield f"{method:<6} loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {len(losses)}, in all places alike"


def main(options: Options) -> int:
    """Train, compare, draw; 1 where something falls short."""
    if options.model is None:
        from parity.models.pretrained import locate  # noqa: PLC0415 - only where its model is wanted

        options = Options(**(vars(options) | {"model": locate(None)}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        runs = {}
        for number, (method, place) in enumerate((m, p) for m in METHODS for p in PLACES):
            runs[method, place] = train(options, method, place, folder / f"{number}")
            sys.stderr.write(f"{method}, {place}: {runs[method, place].losses[-1]:.4f}\n")
    found = list(shortfalls(runs))
    sys.stdout.write("\n".join(found or table(runs)) + "\n")
    if options.picture is not None and not found:
        draw(runs, options.picture)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
