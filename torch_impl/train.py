"""`train`: start, step, save, stop. The recipe, in the order in which it must be.

Clauses: S3, S5, S7, S12, T1 (token-mean loss, accumulation), T2, T3, T5, T6.

    read the text -> load, pack, adapters -> shard -> optimizer -> resume
    a step: N_total over ranks and forwards -> each forward: world * sum / N_total, backward -> norm -> clip -> update
"""

import dataclasses
import hashlib
import json
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_impl import checkpoint, checkpoint_files, optim
from torch_impl.accumulation import backpropagate
from torch_impl.adapter_files import save_adapter
from torch_impl.data import Batch, Dealer, collate, held_out, read_documents, refuse_beyond, sequences
from torch_impl.errors import CheckpointError, DataError, OptionError
from torch_impl.materialize import materialize, recompute_activations
from torch_impl.options import TrainOptions, refuse_unmatched, targets, torch_dtype
from torch_impl.phases import Phases
from torch_impl.report import Report
from torch_impl.sharding import shard_model, shard_size

# what a resumed run must share with the run that it continues
_SAME = ("method", "quant", "rank", "alpha", "rank_stabilized", "target_modules", "optimizer", "dtype", "compute_dtype")
_WARNED = (
    "seed",
    "seq_len",
    "packing",
    "schedule",
    "lr",
    "warmup_steps",
    "steps",
    "clip_norm",
    "weight_decay",
    "dropout",
)
# of an option that is newer than the checkpoint
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainOptions)}


@dataclass
class Run:
    """A run under way."""

    options: TrainOptions
    phases: Phases
    model: nn.Module
    optimizer: torch.optim.Optimizer
    dealer: Dealer
    evaluation: list[list[int]]
    facts: dict[str, Any]
    report: Report
    replicas: int
    """Ranks that hold the same shard."""
    step: int = 0
    position: int = 0

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device


def train(options: TrainOptions, phases: Phases, *, restarted: bool = False) -> None:
    """Run to the last step, or until SIGTERM; the adapter and a checkpoint are saved either way.

    Args:
        options: what to do.
        phases: this rank's, in a process group.
        restarted: torchrun started these ranks again after a loss: go on from the newest checkpoint.

    Raises:
        DoraError: what can't be done as asked, in one line.
    """
    _refuse(options, phases, restarted=restarted)
    run = _started(options, phases, resume=options.resume or restarted)
    with run.report:
        while run.step < options.steps:
            phases.begin(f"step {run.step + 1}")
            if not _one_step(run):
                break
            due = options.save_every and run.step % options.save_every == 0
            if due and run.step < options.steps:
                _save(run)
            if options.eval_every and run.step % options.eval_every == 0 and run.step < options.steps:
                _evaluate(run)
        if run.step == options.steps:
            _evaluate(run)
        _save(run)
        phases.begin("saving the adapter")
        save_adapter(run.model, options.out / "adapter")
        run.report.say(f"adapter and checkpoint of step {run.step} saved under {options.out}")
    phases.begin("the end")


def _refuse(options: TrainOptions, phases: Phases, *, restarted: bool) -> None:
    """What is plain before anything loads."""
    if options.strategy == "none" and phases.world_size > 1:
        raise OptionError(f"--strategy none with {phases.world_size} ranks trains each alone", hint="use ddp or fsdp2")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f".writable-{phases.rank}").touch()
        (options.out / f".writable-{phases.rank}").unlink()
    except OSError as problem:
        raise OptionError(f"--out {options.out} can't be written: {problem}", hint="give a writable folder") from None
    held = checkpoint_files.newest(options.out / "checkpoints")
    if held and not options.resume and not restarted:
        raise CheckpointError(f"{options.out} holds {held.name}", hint="use --resume, or another --out")


def _started(options: TrainOptions, phases: Phases, *, resume: bool) -> Run:
    """Everything up to the first step."""
    with phases.phase("text"):
        kept, evaluation = _text(options)
    with phases.phase("load"):
        torch.manual_seed(options.seed)
        model = materialize(
            options.model,
            options.dora,
            dtype=torch_dtype(options.dtype),
            load=options.load,
            note=lambda name: setattr(phases, "detail", name),
            check=partial(_refuse_model, options=options, items=kept + evaluation),
        )
        model.config.use_cache = False
        if options.checkpoint_activations:
            recompute_activations(model)
        if torch.cuda.is_available() and not options.cpu_offload:
            model = model.cuda()
    with phases.phase("shard"):
        model = shard_model(model, options.sharding)
        optimizer = optim.make_optimizer(model, options.optimizer, lr=options.lr, weight_decay=options.weight_decay)
    torch.manual_seed(options.seed + 1 + phases.rank)  # for a model's own dropout
    shards = shard_size(options.sharding, world_size=phases.world_size)
    dealer = Dealer(kept, options.seed, phases.world_size, phases.rank, options.batch_size, options.accumulate)
    run = Run(
        options=options,
        phases=phases,
        model=model,
        optimizer=optimizer,
        dealer=dealer,
        evaluation=evaluation,
        facts=_facts(options),
        report=Report(options, rank=phases.rank),
        replicas=phases.world_size // shards,
    )
    if resume:
        with phases.phase("resume"):
            _resume(run)
    run.report.begin(run.step)
    return run


def _refuse_model(model: nn.Module, options: TrainOptions, items: list[list[int]]) -> None:
    """What the skeleton tells: text that the model can't read, targets that it hasn't got."""
    refuse_beyond(model, items)
    refuse_unmatched(model, targets(options.target_modules))


def _text(options: TrainOptions) -> tuple[list[list[int]], list[list[int]]]:
    """Training and evaluation sequences."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds

    documents = read_documents(options.data)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    except Exception as problem:  # noqa: BLE001 - the tokenizers' own errors are plain ones
        reason = textwrap.shorten(str(problem), 200)
        raise DataError(f"{options.model} has no tokenizer that loads: {reason}", hint="copy it there") from None
    items = sequences(documents, tokenizer, seq_len=options.seq_len, packing=options.packing)
    return held_out(items, fraction=options.eval_fraction, seed=options.seed)


def _facts(options: TrainOptions) -> dict[str, Any]:
    """What a checkpoint remembers of its run: options, and what model and data were."""
    config = options.model / "config.json"
    weights = {path.name: path.stat().st_size for path in sorted(options.model.glob("*.safetensors"))}
    model = hashlib.sha256(json.dumps(weights).encode() + config.read_bytes()).hexdigest()
    return {"options": options.to_json(), "model": model, "data": checkpoint_files.sha256(options.data)}


def _resume(run: Run) -> None:
    """Go on from the newest checkpoint; from step 0 where there is none."""
    place = checkpoint_files.newest(run.options.out / "checkpoints")
    if place is None:
        run.report.say(f"no checkpoint under {run.options.out}: starting at step 0")
        return
    _, saved = checkpoint.read_state(place)
    _compare(run, place, saved.facts)
    checkpoint.load_(place, run.model, run.optimizer)
    run.step, run.position = saved.step, saved.position
    _tell_recorder(run, place)
    run.report.say(f"resumed from {place.name}")


def _compare(run: Run, place: Path, facts: dict[str, Any]) -> None:
    """Refuse to continue another run; say what else has changed."""
    then, now = _DEFAULTS | facts["options"], run.facts["options"]
    differing = [name for name in _SAME if then[name] != now[name]]
    if facts["model"] != run.facts["model"]:
        differing.append("model")
    if differing:
        raise CheckpointError(f"{place} was made with another {', '.join(differing)}", hint="use the same options")
    changed = [name for name in _WARNED if then[name] != now[name]]
    changed += ["data"] if facts["data"] != run.facts["data"] else []
    if changed:
        run.report.say(f"changed since {place.name}: {', '.join(changed)}; the run isn't the one it continues")


def _one_step(run: Run) -> bool:
    """One optimizer step; False where some rank has been asked to stop, before anything is changed."""
    start = time.perf_counter()
    batches = run.dealer.step(run.position)
    here = float(sum(batch.count for batch in batches))
    total, asked = optim.reduced((here, float(run.phases.stop_requested_at is not None)), device=run.device)
    if asked:
        run.report.say(f"asked to stop after step {run.step}")
        return False
    rate = optim.learning_rate(
        run.step,
        peak=run.options.lr,
        steps=run.options.steps,
        warmup=run.options.warmup_steps,
        schedule=run.options.schedule,
    )
    loss_here = _accumulate(run, batches, total=total)
    (loss,) = optim.reduced((loss_here,), device=run.device)
    norm = optim.gradient_norm(run.model, replicas=run.replicas)
    optim.refuse_useless(run.model, step=run.step + 1, loss=loss, norm=norm)
    optim.clip(run.model, norm=norm, limit=run.options.clip_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step, run.position = run.step + 1, run.position + run.dealer.sequences_per_step
    run.report.step(
        run.step,
        {"loss": loss, "norm": norm, "lr": rate, "tokens": total, "seconds": time.perf_counter() - start},
        device=run.device,
    )
    return True


def _accumulate(run: Run, batches: list[Batch], *, total: float) -> float:
    """S3, T1: the gradient of all forwards; this rank's loss."""
    return backpropagate(
        run.model,
        [partial(_loss_sum, run, batch) for batch in batches],
        total=total,
        world_size=run.dealer.world_size,
        note=lambda under_way: setattr(run.phases, "detail", under_way),
    )


def _loss_sum(run: Run, batch: Batch) -> torch.Tensor:
    """The summed loss of one forward."""
    logits = run.model(input_ids=batch.tokens_SL.to(run.device)).logits
    return optim.cross_entropy_sum(logits, batch.labels_SL.to(run.device))


@torch.no_grad()
def _evaluate(run: Run) -> None:
    """The token-mean loss over what was held out; every rank runs the same number of forwards."""
    if not run.evaluation:
        return
    run.phases.begin(f"evaluation after step {run.step}")
    run.model.eval()
    world, rank = run.dealer.world_size, run.dealer.rank
    total, count = 0.0, 0.0
    for start in range(0, len(run.evaluation), world):
        mine = start + rank
        batch = collate([run.evaluation[min(mine, len(run.evaluation) - 1)]])
        loss = float(_loss_sum(run, batch))
        if mine < len(run.evaluation):
            total, count = total + loss, count + batch.count
    run.model.train()
    loss, tokens = optim.reduced((total, count), device=run.device)
    run.report.evaluation(run.step, loss / tokens)


def _save(run: Run) -> None:
    """A checkpoint of the present step, unless it is there already."""
    folder = run.options.out / "checkpoints"
    held = checkpoint_files.newest(folder)
    if held is not None and held.name == f"step-{run.step:06d}":
        return
    run.phases.begin(f"saving step {run.step}")
    place = checkpoint.save(folder, run.model, run.optimizer, checkpoint.Saved(run.step, run.position, run.facts))
    _tell_recorder(run, place)


def _tell_recorder(run: Run, place: Path) -> None:
    """The recorder names the last whole checkpoint when a rank is lost."""
    if run.phases.recorder is not None:
        run.phases.recorder.tell(f"checkpoint {place}")
