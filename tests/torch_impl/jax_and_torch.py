"""The fine-tune in JAX against that in PyTorch: one loss curve, from the same bits, on the same real text.

    python tests/torch_impl/jax_and_torch.py --picture docs/jax-and-torch.png

SmolLM2 in nested NF4, an adapter on every linear layer. JAX has everything dealt over four devices, as in README's
script; PyTorch is one process. Bytes and quant states must be equal. Each side is then held to the same run in
float64, never to the other at a guessed tolerance: every loss, and at the end every tensor of the adapter (2-norm), may
lie off by `sensitivity.FACTOR` = 32 times the root mean square by which float32's rounding moves the float64 run.

`--controls` trains PyTorch again with one bug at a time; a limit that let one pass would be worth nothing.
"""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import tyro
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))  # as a script and in tests alike

import fine_tunes
from fine_tunes import Plan, Trace

from parity.implementations.mutants.layer import NormNotDetached
from parity.models.pretrained import locate
from parity.oracle.sensitivity import FACTOR, skip_reason
from torch_impl import save_adapter


@dataclass(frozen=True)
class Options:
    """Train on both sides and in float64, compare, and draw."""

    model: Path | None = None
    """A Hugging Face checkpoint of a Llama; SmolLM2-135M-Instruct if not given."""
    layers: int = 30
    """How many of its first layers are run."""
    steps: int = 24
    """Optimizer steps."""
    sequences: int = 4
    """In a batch."""
    seq_len: int = 64
    """Tokens that are predicted in a sequence."""
    seeds: int = 2
    """Float64 runs with rounding noise."""
    controls: bool = False
    """Whether to plant bugs too; each must be found."""
    picture: Path | None = None
    """Where to draw the curves (.png or .svg)."""

    def plan(self) -> Plan:
        """What is run."""
        shape = {"sequences": self.sequences, "seq_len": self.seq_len}
        return Plan(self.model or locate(None), self.layers, steps=self.steps, **shape)


@dataclass(frozen=True)
class Comparison:
    """Both sides beside the truth."""

    exact: Trace
    """In float64."""
    response: Trace
    """By how much rounding moves each loss, and each tensor of the adapter in the 2-norm: root mean squares."""
    runs: Mapping[str, Trace]
    """By side."""
    start: Mapping[str, NDArray[Any]]
    """The adapter that all began with."""
    base: tuple[str, ...] = ()
    """What is not equal to the bit in the packed weights, or lies where it may not."""

    def loss_ratios(self, run: Trace) -> NDArray[np.float64]:
        """Each step's distance from the truth, in units of the limit."""
        return np.abs(run.losses - self.exact.losses) / (FACTOR * self.response.losses)

    def tensor_ratios(self, run: Trace) -> dict[str, float]:
        """The same for those tensors of the adapter of which rounding leaves enough to judge."""
        return {
            name: float(np.linalg.norm(run.adapter[name] - want) / (FACTOR * self.response.adapter[name]))
            for name, want in self.exact.adapter.items()
            if skip_reason(self.response.adapter[name], float(np.linalg.norm(want - self.start[name]))) is None
        }


# --- running -------------------------------------------------------------------------------------------------------


def compare(
    plan: Plan, *, seeds: int, bugs: Mapping[str, Callable[[Plan], Trace]]
) -> tuple[Comparison, dict[str, Trace]]:
    """Train in float64, with noise, in JAX, in PyTorch; and in PyTorch once more with each bug."""
    model = fine_tunes.torch_model(plan)
    start, packed = fine_tunes.torch_adapter(model), fine_tunes.torch_base(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        adapters = fine_tunes.first_adapters(plan, Path(folder))
    frozen = fine_tunes.jax_base(plan, {name: float(weight.state.nested.offset) for name, weight in packed.items()})
    base = tuple(fine_tunes.base_faults(plan, frozen, packed))

    exact, *moved = fine_tunes.truths(plan, frozen, adapters, seeds=seeds)
    runs = {"JAX": fine_tunes.jax_run(plan, frozen, adapters), "PyTorch": fine_tunes.torch_run(plan, model)}
    planted = {name: run(plan) for name, run in bugs.items()}
    return Comparison(exact, root_mean_square(exact, moved), runs, start, base), planted


def root_mean_square(exact: Trace, moved: list[Trace]) -> Trace:
    """Over the noisy runs: of each loss's distance, and of each tensor's in the 2-norm."""
    losses = np.sqrt(np.mean([np.square(run.losses - exact.losses) for run in moved], axis=0))
    squares = {
        name: np.mean([np.sum(np.square(run.adapter[name] - want)) for run in moved])
        for name, want in exact.adapter.items()
    }
    return Trace(losses, {name: np.sqrt(square) for name, square in squares.items()})


# --- bugs ----------------------------------------------------------------------------------------------------------


def _trained(plan: Plan, **changed: Any) -> Trace:
    return fine_tunes.torch_run(plan, fine_tunes.torch_model(plan), **changed)


def _norm_not_held_constant(plan: Plan) -> Trace:
    with NormNotDetached().planted(None, None):  # of any case, in any place
        return _trained(plan)


def _batches_swapped(plan: Plan) -> Trace:
    batches = plan.batches()
    batches[[1, 2]] = batches[[2, 1]]
    return _trained(plan, batches=batches)


def _uncorrected(parameters: list[torch.nn.Parameter], **options: float) -> torch.optim.Optimizer:
    """AdamW that takes its first step for one so late that there is nothing left to correct."""
    optimizer = torch.optim.AdamW(parameters, **options)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1e6)} | moments
    return optimizer


BUGS: Mapping[str, Callable[[Plan], Trace]] = {
    "the norm is not held constant": _norm_not_held_constant,
    "gradients are not clipped": lambda plan: _trained(replace(plan, max_norm=math.inf)),
    "AdamW adds 1e-6 to the root, not 1e-8": lambda plan: _trained(plan, adamw=partial(torch.optim.AdamW, eps=1e-6)),
    "AdamW does not correct its moments": lambda plan: _trained(plan, adamw=_uncorrected),
    "the second and the third batch change places": _batches_swapped,
}


# --- saying --------------------------------------------------------------------------------------------------------


def shortfalls(found: Comparison) -> Iterator[str]:
    """Every way in which the runs don't show what they should."""
    yield from found.base
    for side, run in found.runs.items():
        yield from (f"{side}: {fault}" for fault in faults(found, run))
    if not found.exact.losses[-1] < found.exact.losses[0]:
        yield f"the loss doesn't fall: {found.exact.losses}"


def faults(found: Comparison, run: Trace) -> Iterator[str]:
    """Where a run lies further off the truth than rounding explains."""
    ratios, tensors = found.loss_ratios(run), found.tensor_ratios(run)
    wide = np.flatnonzero(~(ratios <= 1))  # NaN is wide
    if wide.size:
        at = wide[0]
        got, want = run.losses[at], found.exact.losses[at]
        yield (
            f"{wide.size} losses lie off, first at step {at + 1}: {got:.8g}, want {want:.8g}, {ratios[at]:.3g} x limit"
        )
    if not tensors:
        yield "no tensor of the adapter can be judged"
        return
    worst = max(tensors, key=lambda name: tensors[name] if tensors[name] == tensors[name] else math.inf)
    count = sum(not ratio <= 1 for ratio in tensors.values())
    if count:
        yield f"{count} of {len(tensors)} tensors of the adapter lie off, {worst} most: {tensors[worst]:.3g} x limit"


def table(found: Comparison) -> Iterator[str]:
    """What was compared, and how far off it was."""
    exact, sides = found.exact, found.runs
    yield f"base     {len(exact.adapter) // 3} packed weights, equal to the bit with all of their quant states"
    yield f"float64  loss {exact.losses[0]:.4f} at step 1, {exact.losses[-1]:.4f} at step {len(exact.losses)}"
    for side, run in sides.items():
        ratios, tensors = found.loss_ratios(run), found.tensor_ratios(run)
        off = np.abs(run.losses - exact.losses).max()
        yield f"{side:<8} losses within {off:.1e}, {ratios.max():.2f} x limit; tensors within {_worst(tensors)}"
    one, other = (run.losses for run in sides.values())
    judged = len(found.tensor_ratios(next(iter(sides.values()))))
    yield f"apart    losses by at most {np.abs(one - other).max():.1e}; {judged} of {len(exact.adapter)} tensors judged"


def _worst(tensors: Mapping[str, float]) -> str:
    return f"{max(tensors.values()):.2f} x limit"


def draw(found: Comparison, picture: Path) -> None:
    """Both curves above; beneath, how far each lies off the float64 run, in units of the limit."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only where something is drawn

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    above, beneath = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(found.exact.losses) + 1)
    marks = {"JAX": {"linestyle": "-", "color": "tab:orange"}, "PyTorch": {"linestyle": "", "marker": "o"}}
    labels = {"JAX": "JAX, dealt over four devices", "PyTorch": "PyTorch, one process"}
    for side, run in found.runs.items():
        style = {"color": "tab:blue", "fillstyle": "none", "markersize": 6} | marks[side]
        above.plot(steps, run.losses, label=labels[side], **style)
        off = (run.losses - found.exact.losses) / (FACTOR * found.response.losses)
        beneath.plot(steps, off, **(style | {"linestyle": "-"}))
    above.set(ylabel="loss, nat a token")
    above.legend(fontsize=8)
    beneath.axhspan(-1, 1, color="0.92", zorder=0)
    beneath.set(xlabel="step", ylabel="off float64, x limit", ylim=(-1.2, 1.2))
    for axes in (above, beneath):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)


def main(options: Options) -> int:
    """Train, compare, draw; 1 where something falls short, or a bug is not found."""
    jax.config.update("jax_num_cpu_devices", fine_tunes.DEVICES)
    jax.config.update("jax_enable_x64", True)
    found, planted = compare(options.plan(), seeds=options.seeds, bugs=BUGS if options.controls else {})
    lines = list(shortfalls(found))
    sys.stdout.write("\n".join(lines or table(found)) + "\n")
    missed = 0
    for bug, run in planted.items():
        said = list(faults(found, run))
        missed += not said
        sys.stdout.write(f"{'found' if said else 'MISSED'}: {bug}: {'; '.join(said)}\n")
    if options.picture is not None and not lines:
        draw(found, options.picture)
    return 1 if lines or missed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
