"""`train`: start, step, save, stop. The recipe, in the order in which it must be.

Clauses: S3, S5, S7, S12, T1 (token-mean loss, accumulation), T2, T3, T5, T6.

    read the text -> load, pack, adapters -> shard -> optimizer -> resume
    a step: N_total over ranks and forwards -> each forward: world * sum / N_total, backward -> norm -> clip -> update
"""

import fcntl
import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_impl.compiling import compile_blocks
from torch_impl.errors import CheckpointError, DataError, OptionError
from torch_impl.files import checkpoint
from torch_impl.files import checkpoint_disk as checkpoint_files
from torch_impl.files.adapter import WEIGHTS, save_adapter
from torch_impl.files.materialize import materialize, recompute_activations
from torch_impl.sharding.apply import shard_model
from torch_impl.sharding.meshes import shard_size, tensor_size
from torch_impl.sharding.tensor_parallel import refuse_uncuttable
from torch_impl.strategies import STRATEGIES
from torch_impl.training import continuation, optim
from torch_impl.training.accumulation import backpropagate
from torch_impl.training.data import Batch, Dealer, collate, held_out, read_documents, refuse_beyond, sequences
from torch_impl.training.options import TrainOptions, parameters, refuse_unmatched, targets, torch_dtype
from torch_impl.training.phases import Phases
from torch_impl.training.report import Report


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
    counts: bool
    """Whether this rank's tokens and loss are its own: tensor ranks see the same, of which the first counts (S10)."""
    step: int = 0
    position: int = 0

    @property
    def device(self) -> torch.device:
        """Where it computes; shards that are offloaded lie elsewhere."""
        return torch.device("cuda") if self.options.cpu_offload else next(self.model.parameters()).device


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
    with _alone_in(options.out, rank=phases.rank):
        _to_the_end(_started(options, phases, resume=options.resume or restarted))
    phases.begin("the end")


def _to_the_end(run: Run) -> None:
    """Step, save and evaluate until the last step, or until a rank is asked to stop; then save for good."""
    options, phases = run.options, run.phases
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


@contextmanager
def _alone_in(out: Path, *, rank: int) -> Iterator[None]:
    """Rank 0 locks the output: two runs in one folder would delete each other's files.

    Raises:
        OptionError: another run holds it.
    """
    if rank:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise OptionError(f"another run is writing --out {out}", hint="end it, or give another --out") from None
    except OSError:
        pass  # some network file systems lock no folders
    try:
        yield
    finally:
        os.close(folder)


def _refuse(options: TrainOptions, phases: Phases, *, restarted: bool) -> None:
    """What is plain before anything loads."""
    if STRATEGIES[options.strategy].alone and phases.world_size > 1:
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
    if held is None and (options.out / "adapter" / WEIGHTS).exists():
        raise CheckpointError(f"{options.out} holds an adapter and no checkpoint", hint="use another --out")


def _started(options: TrainOptions, phases: Phases, *, resume: bool) -> Run:
    """Everything up to the first step."""
    with phases.phase("text"):
        kept, evaluation = _text(options)
    with phases.phase("load"):
        torch.manual_seed(options.seed)
        model: Any = materialize(
            options.model,
            options.dora,
            dtype=torch_dtype(options.dtype),
            load=options.load,
            note=lambda name: setattr(phases, "detail", name),
            check=partial(_refuse_model, options=options, items=kept + evaluation, ranks=phases.world_size),
        )
        model.config.use_cache = False
        if options.checkpoint_activations:
            recompute_activations(model)
        if torch.cuda.is_available() and not options.cpu_offload:
            model = model.cuda()
        if options.compile_blocks:
            compile_blocks(model)
    with phases.phase("shard"):
        model = shard_model(model, options.sharding)
        optimizer = optim.make_optimizer(model, options.optimizer, lr=options.lr, weight_decay=options.weight_decay)
    tensor = tensor_size(options.sharding, world_size=phases.world_size)
    shards = shard_size(options.sharding, world_size=phases.world_size)
    batches, own = phases.world_size // tensor, phases.rank // tensor
    torch.manual_seed(options.seed + 1 + own)  # for dropout, the same on tensor ranks
    dealer = Dealer(kept, options.seed, batches, own, options.batch_size, options.accumulate)
    run = Run(
        options=options,
        phases=phases,
        model=model,
        optimizer=optimizer,
        dealer=dealer,
        evaluation=evaluation,
        facts=continuation.facts(options),
        report=Report(options, rank=phases.rank),
        replicas=batches // shards,
        counts=phases.rank % tensor == 0,
    )
    if resume:
        with phases.phase("resume"):
            _resume(run)
    run.report.begin(run.step)
    return run


def _refuse_model(model: nn.Module, options: TrainOptions, items: list[list[int]], ranks: int) -> None:
    """What the skeleton tells: text that the model can't read, targets that it hasn't got or ranks can't share."""
    refuse_beyond(model, items)
    refuse_unmatched(model, targets(options.target_modules), parameters(options.target_parameters))
    if options.sharding.how.tensor:
        shared = tensor_size(options.sharding, world_size=ranks)
        refuse_uncuttable(model, options.sharding, ranks=shared, dora=options.dora)


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


def _resume(run: Run) -> None:
    """Go on from the newest checkpoint; from step 0 where there is none."""
    place = checkpoint_files.newest(run.options.out / "checkpoints")
    if place is None:
        run.report.say(f"no checkpoint under {run.options.out}: starting at step 0")
        return
    state, saved = checkpoint.read_state(place)
    if saved.step > run.options.steps:
        raise OptionError(f"--steps {run.options.steps} is below {place.name}, done already", hint="raise it")
    worlds = (state["world_size"], run.phases.world_size)
    changed = continuation.differences(place, saved.facts, run.facts, worlds=worlds)
    if changed:
        run.report.say(f"changed since {place.name}: {', '.join(changed)}; the run isn't the one it continues")
    checkpoint.load_(place, run.model, run.optimizer)
    for group in run.optimizer.param_groups:
        group["weight_decay"] = run.options.weight_decay
    run.step, run.position = saved.step, saved.position
    _tell_recorder(run, place)
    run.report.say(f"resumed from {place.name}")


def _one_step(run: Run) -> bool:
    """One optimizer step; False where some rank has been asked to stop, before anything is changed."""
    start = time.perf_counter()
    batches = run.dealer.step(run.position)
    here = float(sum(batch.count for batch in batches)) * run.counts
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
    (loss,) = optim.reduced((loss_here * run.counts,), device=run.device)
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
        if mine < len(run.evaluation) and run.counts:
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
