"""`python -m torch_impl preflight`: the findings, units, memory and wire of a run that hasn't begun.

Clauses: those of `torch_impl.preflight.report`. No weight is read: a configuration is enough.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from torch_impl.config import ALL_LINEAR, DoraConfig, Method, QuantConfig, ShardConfig, Units
from torch_impl.errors import OptionError
from torch_impl.files.materialize import recompute_activations, skeleton, stored_quant
from torch_impl.memory import host_memory
from torch_impl.preflight.costs import Link
from torch_impl.preflight.report import Report, preflights
from torch_impl.strategies import STRATEGIES, DataName
from torch_impl.training.options import Dtype, parameters, refuse_below, refuse_unmatched, targets, torch_dtype

SCHEMA = 1
_GIB = 2.0**30


@dataclass(frozen=True)
class PreflightOptions:
    """Say what will fail or be silently wrong before a weight is read. Exit status 1 where something would."""

    model: Path
    """Hugging Face checkpoint, or its config.json alone."""
    world_size: int = 1
    """Ranks of the run."""
    json: Path | None = None
    """Write the report here as well."""
    strategy: Literal["all", DataName] = "all"
    """One strategy, or each that fits the world size; tensor ranks are not judged."""
    shard_size: int | None = None
    """hsdp: ranks that share one copy."""
    method: Method = "dora"
    """dora or lora."""
    quant: Literal["none", "nf4"] = "none"
    """How the base weights are stored."""
    quant_storage: Literal["bfloat16", "float16", "float32", "uint8"] = "bfloat16"
    """What packed bytes are viewed as."""
    rank: int = 8
    """r, the inner size of B A."""
    alpha: float = 16.0
    """Numerator of the scaling."""
    target_modules: str = ALL_LINEAR
    """all-linear, or endings of module names separated by commas."""
    target_parameters: str = ""
    """Endings of names of parameters that hold experts, separated by commas: gate_up_proj,down_proj, say."""
    dtype: Dtype = "auto"
    """The base model's dtype; auto is the configuration's."""
    compute_dtype: Dtype = "auto"
    """What adapted layers multiply in; auto is the base weight's."""
    param_dtype: Dtype = "auto"
    """What dense weights are gathered as; auto leaves them as they are."""
    batch_size: int = 1
    """Sequences of one rank in one forward, for the estimate of memory."""
    seq_len: int = 0
    """Tokens of one sequence; 0 leaves activations out."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass."""
    units: Literal["auto", "block", "layer"] = "auto"
    """What is gathered together; auto is a block under fsdp2 and hsdp, and a layer's parts under FSDP1."""
    link_latency: float = 20.0
    """Microseconds until the first byte of a message reaches another rank."""
    link_bandwidth: float = 25.0
    """Gigabytes a second that a rank can send."""

    def __post_init__(self) -> None:
        refuse_below(self, {"world_size": 1, "batch_size": 1, "seq_len": 0, "shard_size": 1, "link_latency": 0})
        if not self.link_bandwidth > 0:
            raise OptionError(f"--link-bandwidth {self.link_bandwidth} carries nothing", hint="use 25, say")

    @property
    def dora(self) -> DoraConfig:
        """The adapter."""
        return DoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            target_modules=targets(self.target_modules),
            target_parameters=parameters(self.target_parameters),
            quant=QuantConfig(quant_storage=getattr(torch, self.quant_storage)) if self.quant == "nf4" else None,
            compute_dtype=torch_dtype(self.compute_dtype),
            method=self.method,
        )

    def shards(self) -> list[ShardConfig]:
        """What is to be judged."""
        fitting = [s for s, how in STRATEGIES.items() if not how.tensor and (self.world_size == 1 or not how.alone)]
        names = fitting if self.strategy == "all" else [self.strategy]
        wire = torch_dtype(self.param_dtype)
        return [ShardConfig(s, wire, shard_size=self.shard_size, units=self._units_of(s)) for s in names]

    def _units_of(self, strategy: str) -> Units | None:
        """Where all strategies are judged, blocks are for those that can gather one."""
        flat = STRATEGIES[strategy].flat
        return None if self.units == "auto" or (self.strategy == "all" and flat) else self.units

    @property
    def link(self) -> Link:
        """What joins two ranks."""
        return Link(latency=self.link_latency * 1e-6, bandwidth=self.link_bandwidth * 1e9)


def command(words: Sequence[str]) -> int:
    """Run the verb; 1 where a strategy that was asked for would fail or be silently wrong.

    Raises:
        DoraError: the configuration can't be read, or the adapter can't be put on it.
    """
    options = tyro.cli(PreflightOptions, args=list(words), prog="python -m torch_impl preflight")
    before, start = host_memory(peak=False), time.perf_counter()
    with torch.device("meta"):
        model = skeleton(options.model, dtype=torch_dtype(options.dtype))
    refuse_unmatched(model, targets(options.target_modules), parameters(options.target_parameters))
    if options.checkpoint_activations:
        recompute_activations(model)
    stored = stored_quant(options.model) if options.quant == "none" else None
    reports = preflights(
        model,
        options.shards(),
        world_size=options.world_size,
        dora=dataclasses.replace(options.dora, quant=stored) if stored else options.dora,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
    )
    seconds, memory = time.perf_counter() - start, host_memory(peak=True) - before
    sys.stdout.write("\n".join([*_lines(options, reports), f"judged in {seconds:.1f} s"]) + "\n")
    if options.json is not None:
        found = {"schema": SCHEMA, "model": str(options.model), "seconds": seconds, "memory_over_imports": memory}
        _write(options.json, found | {"strategies": [r.to_json() for r in reports]})
    return 0 if all(report.ok for report in reports) else 1


def _write(path: Path, found: dict[str, Any]) -> None:
    """The report as a file."""
    try:
        path.write_text(json.dumps(found, indent=2) + "\n")
    except OSError as problem:
        raise OptionError(f"--json {path} can't be written: {problem}", hint="give a writable place") from None


def _lines(options: PreflightOptions, reports: list[Report]) -> list[str]:
    """The report in words: what trains, then each strategy's verdict, costs and findings."""
    packed = any(member.kind == "packed" for unit in reports[0].plan.units for member in unit.members)
    plan, quant = reports[0].plan, "as stored" if packed and options.quant == "none" else options.quant
    share = f"{plan.trainable:,} of {plan.total:,} parameters train ({100 * plan.trainable / plan.total:.2f} %)"
    lines = [f"{options.model}: {options.method}, rank {options.rank}, quant {quant}: {share}"]
    for report in reports:
        verdict = "can train" if report.ok else "would fail or be silently wrong"
        rest, peak, wire = (
            f"{n / _GIB:.3f} GiB" for n in (report.costs.at_rest, report.costs.at_peak, report.costs.wire)
        )
        without = "" if report.costs.activations else " without activations"
        lines += [
            f"{report.strategy} on {report.world_size} ranks: {verdict}",
            f"  units: {', '.join(f'{count} {rule}' for rule, count in report.units.items())}",
            f"  a rank: {rest} at rest, about {peak} at peak{without}, {wire} sent a step",
            _communication(report, options),
            *(f"  {finding}" for finding in report.findings),
        ]
    return lines


def _communication(report: Report, options: PreflightOptions) -> str:
    """How often a step communicates, and what that takes at least."""
    seconds = report.least_seconds(options.link)
    return (
        f"  a step: {report.costs.gathers} gathers, {report.costs.reductions} reductions, at least "
        f"{1000 * seconds:.1f} ms over links of {options.link_latency:g} us and {options.link_bandwidth:g} GB/s"
    )
