"""The options of `train`: one frozen dataclass, from flags or a file, saved beside what it made.

tyro makes the command line of it: each docstring is an option's help. Values are checked here, before anything loads.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torch_impl.config import ALL_LINEAR, DoraConfig, Method, QuantConfig, ShardConfig
from torch_impl.errors import OptionError
from torch_impl.strategies import STRATEGIES, StrategyName

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainOptions:
    """Fine-tune a causal language model's adapters; under torchrun for more than one process.

    `--config FILE` takes options from a JSON object, such as the run.json of another run; flags win over it.
    """

    model: Path
    """Hugging Face checkpoint: a directory with config.json, a tokenizer and safetensors."""
    data: Path
    """Training text: .txt (blank lines part documents) or .jsonl (an object with "text" a line)."""
    out: Path
    """Output directory: run.json, metrics.jsonl, adapter/, checkpoints/."""
    method: Method = "dora"
    """dora or lora."""
    quant: Literal["none", "nf4"] = "none"
    """How the base weights are stored."""
    quant_storage: Literal["bfloat16", "float16", "float32", "uint8"] = "bfloat16"
    """What packed bytes are viewed as; --param-dtype must be the same, or auto (S6)."""
    strategy: StrategyName = "fsdp2"
    """How parameters are sharded over the ranks."""
    units: Literal["auto", "block", "layer"] = "auto"
    """What is gathered together: auto is a block under fsdp2 and hsdp, layer is for blocks that don't fit."""
    shard_size: int | None = None
    """hsdp: ranks that share one copy."""
    tensor_size: int | None = None
    """fsdp2-tp: ranks that share each layer's features and see the same text; tp has all."""
    rank: int = 8
    """r, the inner size of B A."""
    alpha: float = 16.0
    """Numerator of the scaling."""
    rank_stabilized: bool = False
    """Divide alpha by sqrt(r) instead of r."""
    dropout: float = 0.0
    """Share of an adapter's input that is dropped while training."""
    target_modules: str = ALL_LINEAR
    """all-linear, or endings of module names separated by commas."""
    target_parameters: str = ""
    """Endings of names of parameters that hold experts, separated by commas: gate_up_proj,down_proj, say."""
    dtype: Dtype = "auto"
    """The base model's dtype; auto is the checkpoint's."""
    compute_dtype: Dtype = "auto"
    """What adapted layers multiply in; auto is the base weight's."""
    param_dtype: Dtype = "auto"
    """What dense weights are gathered as; auto leaves them as they are."""
    reduce_dtype: Dtype = "auto"
    """What gradients other than the adapters' are reduced in."""
    steps: int = 100
    """Optimizer steps of the whole run, those before a resume included."""
    batch_size: int = 1
    """Sequences of one rank in one forward."""
    accumulate: int = 1
    """Forwards of one step."""
    seq_len: int = 512
    """Tokens of one sequence."""
    packing: bool = True
    """Join documents and cut every seq_len tokens; otherwise a document is a sequence."""
    lr: float = 1e-4
    """Largest learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: cosine to zero at the last step, or no change."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    weight_decay: float = 0.0
    """The optimizer's, on all that trains."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 doesn't clip."""
    seed: int = 0
    """Of the adapter's start and the data's order."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end and on SIGTERM."""
    resume: bool = False
    """Go on from the newest checkpoint under --out."""
    eval_fraction: float = 0.0
    """Share of the sequences held out for evaluation."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only, where something is held out."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass."""
    compile_blocks: bool = False
    """Compile each block by itself with torch.compile; under fsdp2, hsdp or ddp."""
    cpu_offload: bool = False
    """Keep shards in host memory between uses: on GPUs, with fsdp2 or hsdp."""
    load: Literal["each", "rank0"] = "each"
    """Who reads the weights: each rank from its own disk, or rank 0, which sends them tensor by tensor."""
    phase_timeout: float = 600.0
    """Seconds that any phase (load, a step, a save) may take before the run is ended with every rank's stack."""
    tensorboard: bool = False
    """Write TensorBoard events under --out; needs the tensorboard package."""

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "seq_len": 2, "warmup_steps": 0, "save_every": 0}
        refuse_below(
            self, at_least | {"eval_every": 0, "clip_norm": 0, "weight_decay": 0, "shard_size": 1, "tensor_size": 1}
        )
        for name in ("lr", "phase_timeout"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise OptionError(f"--{_flag(name)} {getattr(self, name)} is no positive number", hint="change it")
        if not 0 <= self.eval_fraction < 1:
            raise OptionError(f"--eval-fraction {self.eval_fraction} is not in [0, 1)", hint="use 0.1, say")
        if not -(2**63) <= self.seed < 2**63:
            raise OptionError(f"--seed {self.seed} is beyond 64 bits", hint="use a smaller one")
        self._refuse_idle()
        self.dora  # noqa: B018 - refuse bad adapters at once
        self.sharding  # noqa: B018 - likewise

    def _refuse_idle(self) -> None:
        """An option that would do nothing beside the others was meant to do something."""
        if self.cpu_offload and not torch.cuda.is_available():
            raise OptionError("--cpu-offload without a GPU moves nothing", hint="leave it out")
        if self.shard_size is not None and not STRATEGIES[self.strategy].hybrid:
            hint = "use --strategy hsdp or fsdp1-hybrid, or leave it out"
            raise OptionError(f"--shard-size {self.shard_size} needs replicas", hint=hint)
        if self.eval_every and not self.eval_fraction:
            raise OptionError(
                f"--eval-every {self.eval_every} has nothing to read", hint="give --eval-fraction 0.1, say"
            )

    @property
    def dora(self) -> DoraConfig:
        """The adapter."""
        return DoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            target_modules=targets(self.target_modules),
            target_parameters=parameters(self.target_parameters),
            quant=QuantConfig(quant_storage=getattr(torch, self.quant_storage)) if self.quant == "nf4" else None,
            rank_stabilized=self.rank_stabilized,
            compute_dtype=torch_dtype(self.compute_dtype),
            method=self.method,
            dropout=self.dropout,
        )

    @property
    def sharding(self) -> ShardConfig:
        """The strategy and the wire."""
        return ShardConfig(
            strategy=self.strategy,
            param_dtype=torch_dtype(self.param_dtype),
            reduce_dtype=torch_dtype(self.reduce_dtype),
            shard_size=self.shard_size,
            cpu_offload=self.cpu_offload,
            tensor_size=self.tensor_size,
            units=None if self.units == "auto" else self.units,
        )

    def to_json(self) -> dict[str, Any]:
        """Every option as JSON has it; `from_file` reads it."""
        return {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(self).items()}


def targets(words: str) -> str | list[str]:
    """What `--target-modules` names: `all-linear`, or the endings between its commas.

    Raises:
        OptionError: nothing stands between two commas.
    """
    endings = _endings(words, "target-modules", example="q_proj,v_proj")
    return ALL_LINEAR if endings == [ALL_LINEAR] else endings


def parameters(words: str) -> list[str]:
    """What `--target-parameters` names: the endings between its commas, or nothing.

    Raises:
        OptionError: nothing stands between two commas.
    """
    return _endings(words, "target-parameters", example="gate_up_proj,down_proj") if words else []


def _endings(words: str, option: str, *, example: str) -> list[str]:
    endings = [ending.strip() for ending in words.split(",")]
    if not all(endings):
        raise OptionError(f"--{option} {words!r} has an empty name", hint=f"write {example}, say")
    return endings


def refuse_unmatched(model: nn.Module, modules: str | list[str], parameters: list[str]) -> None:
    """A misspelt name beside right ones would leave its layers without adapters, unnoticed.

    Raises:
        OptionError: no module, or no parameter, has one of the endings.
    """
    there = [f".{name}" for name, _ in model.named_modules(remove_duplicate=False)]
    for ending in [] if modules == ALL_LINEAR else modules:
        if not any(name.endswith(f".{ending}") for name in there):
            raise OptionError(f"--target-modules {ending!r} matches nothing", hint="correct it, or leave it out")
    there = [f".{name}" for name, _ in model.named_parameters(remove_duplicate=False)]
    for ending in parameters:
        if not any(name.endswith(f".{ending}") for name in there):
            raise OptionError(f"--target-parameters {ending!r} matches nothing", hint="correct it, or leave it out")


def refuse_below(options: Any, at_least: dict[str, int]) -> None:
    """Refuse options below their least values, and what is no finite number.

    Raises:
        OptionError: names the option, its value and the least.
    """
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise OptionError(f"--{_flag(name)} {value} is below {least}, or no finite number", hint="change it")


def _flag(name: str) -> str:
    """An option's name on the command line."""
    return name.replace("_", "-")


def torch_dtype(name: Dtype) -> torch.dtype | None:
    """`auto` is None."""
    return None if name == "auto" else getattr(torch, name)


def from_file(path: Path) -> dict[str, Any]:
    """Options by field name from a JSON file (a run's own run.json, say); flags override them.

    Raises:
        OptionError: the file can't be read, or holds what is no option.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise OptionError(f"--config {path} can't be read: {problem}", hint="give a run.json") from None
    fields = {field.name: field for field in dataclasses.fields(TrainOptions)}
    if not isinstance(found, dict) or found.keys() - fields.keys():
        wrong = sorted(found.keys() - fields.keys()) if isinstance(found, dict) else "no object"
        raise OptionError(f"--config {path} holds no such options: {wrong}", hint="see train --help")
    for key, value in found.items():
        if not _fits(fields[key].type, value):
            raise OptionError(f"--config {path}: {key} can't be {value!r}", hint="see train --help")
    return {key: Path(value) if fields[key].type is Path else value for key, value in found.items()}


def _fits(wanted: Any, value: object) -> bool:
    """Whether JSON has this value for an option of this type."""
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    return isinstance(value, int | float | None) if wanted in (int, float, int | None) else isinstance(value, str)
