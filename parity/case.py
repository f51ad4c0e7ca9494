"""A case says what is to be shown. It is declared, never coded.

Axis legend for shapes: a layer is `(in, out)`, as in `torch.nn.Linear`. Everything that a rank needs to
rebuild the case's inputs is in the case itself, so a case identifier and a seed are a whole reproduction.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Link = Literal["algebra", "shards", "frameworks", "training", "controls"]
Model = Literal["stack", "codec", "checkpoint", "pretrained"]
Proof = Literal["lattice", "one-hot", "bound", "start", "root", "sensitivity", "decode", "files", "refusal", "neutral"]
Base = Literal["float32", "bfloat16", "float64", "nf4", "fp4"]
Compute = Literal["float32", "bfloat16", "float16", "float64"]
Task = Literal["train", "merge", "written", "read", "refuse"]

LINKS: tuple[Link, ...] = ("algebra", "shards", "frameworks", "training", "controls")
FAINT = 2.0**-20
"""What the cotangent of a faint case is multiplied by."""
UNSHARDED = "none"
"""The strategy of a case that one process runs without any sharding."""

TORCH_STRATEGIES = (UNSHARDED, "fsdp1", "fsdp1-orig", "fsdp1-hybrid", "fsdp2", "hsdp", "ddp")
"""What `torch_impl` and third parties run; all other strategies belong to a built-in subject."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to show, about one model, under one strategy."""

    link: Link
    """The link of the argument that this case belongs to."""
    model: Model
    """A stack of linear layers, the 4-bit codec alone, a small Llama's packed checkpoint, or a pretrained network."""
    proof: Proof
    """How the shards are compared, and hence what the inputs must be."""
    subject: str = "torch_impl"
    """The implementation that runs it; `--impl` replaces `torch_impl` only."""
    strategy: str = UNSHARDED
    """How the subject shards."""
    world: int = 1
    """The number of ranks."""
    layers: tuple[tuple[int, int], ...] = ()
    """`(in, out)` of each linear layer of a stack."""
    shape_name: str = ""
    """The name that the identifier gives those shapes."""
    rank: int = 4
    """The adapter's inner size r."""
    alpha: float = 4.0
    """D1: the numerator of the scaling."""
    rank_stabilized: bool = False
    """D1: whether the denominator is the rank's root."""
    tokens: int = 24
    """Tokens of all ranks together; they are dealt unevenly."""
    base: Base = "float32"
    """How the frozen weight is stored."""
    flat: bool = False
    """Whether the scales of a packed checkpoint are float32 themselves, and not 8-bit codes of them (Q6)."""
    storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8"
    """What the bytes of a packed checkpoint are seen as (Q3)."""
    compute: Compute = "float32"
    """The dtype that the layer multiplies in."""
    param_dtype: Compute | None = None
    """What FSDP casts the dense base weight to on the wire; None leaves it."""
    reduce_dtype: Compute | None = None
    """What FSDP reduces gradients of anything but adapters in (T4); None leaves it."""
    activation: Literal["identity", "relu"] = "identity"
    """What stands between two layers of a stack."""
    dropout: float = 0.0
    """The share of each layer's input that is dropped (D9), by masks that are inputs."""
    method: Literal["dora", "lora"] = "dora"
    """`lora` has no magnitude: c is 1."""
    blocksize: int = 64
    """Elements that share a scale in a four-bit base (Q1)."""
    replicas: int = 2
    """Under hsdp and fsdp1-hybrid: how many copies there are of each shard (S9)."""
    keep_gathered: bool = False
    """Whether what was gathered for the forward is kept for the backward (`reshard_after_forward=False`)."""
    counted: bool = False
    """Whether the collectives of each step are counted (S7, S9, S11, T5)."""
    bias: bool = False
    """Whether the base layers have one (D8)."""
    zero_rows: bool = False
    """Whether some rows of V are zero (D7)."""
    ties: bool = False
    """Whether the codec's weights lie on the midpoints between two codes and on their float32 neighbours (Q5)."""
    hard_rows: bool = False
    """Whether some rows of V are tiny, some huge, and some nearly cancel s B A (D4, D13)."""
    batched: bool = False
    """Whether the tokens come as two sequences, `(2, tokens / 2, in)`."""
    zero_b: bool = False
    """Whether B starts at zero (D12)."""
    task: Task = "train"
    """What is done: training; merging (D10); writing adapter files that the reference reads, or reading what it wrote
    (C1); writing a packed checkpoint that both read (C2); refusing what is bad."""
    bad: str = ""
    """What is to be refused, by name."""
    steps: int = 1
    """Optimizer steps (T3)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """What makes them: SGD with momentum, or AdamW."""
    accumulate: int = 1
    """Forwards of a rank for one step, each with its backward (T1); the loss is then the mean over all tokens."""
    late: bool = False
    """Whether gradients are reduced once a step, with the last backward (T5)."""
    clip: float = 0.0
    """The largest norm that the gradient of a step may have (T2); 0 leaves it."""
    faint: bool = False
    """Whether gradients are so small that clipping's addend counts (S5)."""
    recompute: bool = False
    """Whether activations are computed again in the backward pass (T5)."""
    resume: str = ""
    """Halfway the run is saved, read into a fresh model, and goes on under this strategy (T6, S12)."""
    blocks: int = 0
    """Decoder blocks of a pretrained network that are kept."""
    clauses: tuple[str, ...] = ()
    """The clauses of SPEC.md that its checks bear on."""
    divide_gradients_by: int = 1
    """For an unsharded twin of a one-hot case: the world size that its gradients are divided by."""
    twin_world: int = 0
    """For an unsharded twin: the world size whose batches it sees."""
    seed: int = 0
    """Changes every drawn number."""

    @property
    def id(self) -> str:
        """The identifier: the same words in the same order for every case."""
        parts = [self.model, self.proof, self.subject, f"{self.strategy}-w{self.world}"]
        parts.append(self.shape_name or f"{self.blocks}-blocks")
        parts.append(f"{self.base}-{self.compute}")
        parts.append("+".join(self._features()).replace("_", "-") or "plain")
        return "/".join(parts)

    def _features(self) -> list[str]:
        """The identifier's last part: what departs from the plain case."""
        drawn = ("bias", "zero_rows", "hard_rows", "ties", "zero_b", "batched", "faint")
        how = ("late", "recompute", "keep_gathered", "counted")
        named = {
            "": self.activation if self.activation != "identity" else "",
            "dropout-": f"{self.dropout:g}" if self.dropout else "",
            "tokens-": self.tokens if self.tokens < self.input_world else "",
            "method-": self.method if self.method != "dora" else "",
            "blocks-of-": self.blocksize if self.blocksize != DEFAULTS["blocksize"] else "",
            "replicas-": self.replicas if self.replicas != DEFAULTS["replicas"] else "",
            "storage-": self.storage if self.storage != "uint8" else "",
            "wire-": self.param_dtype,
            "reduce-": self.reduce_dtype,
            "by-": self.optimizer if self.optimizer != "sgd" else "",
            "accumulate-": self.accumulate if self.accumulate > 1 else "",
            "clip-": f"{self.clip:g}" if self.clip else "",
            "resume-": self.resume,
        }
        return [
            *([self.task] if self.task in {"merge", "written", "read"} else []),
            *([self.bad] if self.bad else []),
            *(name for name in ("rank_stabilized", "flat", *drawn, *how) if getattr(self, name)),
            *(f"{words}{value}" for words, value in named.items() if value),
        ]

    @property
    def has_twin(self) -> bool:
        """Whether its shards are compared with another run of the same implementation, and not with the oracle."""
        return self.proof == "one-hot" or (self.link == "shards" and self.proof in {"start", "files"})

    @property
    def scaling(self) -> float:
        """D1, as inputs need it; the oracle has the specification's own."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def learning_rate(self) -> float:
        """Dyadic, so that the first update of a lattice case is exact; as much larger as gradients are fainter."""
        if self.faint:
            return 2.0**-4 / FAINT
        return 2.0**-4 if self.model != "pretrained" else 2.0**-7

    @property
    def momentum(self) -> float:
        """SGD's momentum (T3)."""
        return 0.5

    @property
    def is_exact(self) -> bool:
        """Whether nothing rounds: a lattice, unless a norm's root or a moment's takes part."""
        return self.proof == "lattice" and not self.clip and self.optimizer == "sgd"

    @property
    def weight_decay(self) -> float:
        """AdamW's."""
        return 2.0**-6

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What the optimizer keeps of each parameter."""
        if self.optimizer == "adamw":
            return ("optimizer:exp_avg", "optimizer:exp_avg_sq")
        return ("optimizer:momentum_buffer",)

    @property
    def resumes_after(self) -> int:
        """The step after which a resumed case is saved; beyond the last one where it is not."""
        return self.steps // 2 if self.resume else self.steps

    @property
    def copies(self) -> int:
        """On how many ranks each element lies: as many as there are rows of a mesh (S9), every rank under ddp."""
        return {"hsdp": self.replicas, "fsdp1-hybrid": self.replicas, "ddp": self.world}.get(self.strategy, 1)

    def copies_at(self, step: int) -> int:
        """The same after a step: a resumed case may go on under another strategy."""
        if step <= self.resumes_after:
            return self.copies
        return dataclasses.replace(self, strategy=self.resume).copies

    @property
    def mesh(self) -> tuple[int, int, int]:
        """The sizes of the axes `replicate`, `shard` and `tensor` under `mesh-RxSxT` (S9, S10)."""
        replicate, shard, tensor = map(int, self.strategy.removeprefix("mesh-").split("x"))
        return replicate, shard, tensor

    @property
    def input_world(self) -> int:
        """How many batches are dealt; the twin sees those of the case it stands beside, tensor ranks the same one."""
        data_ranks = self.mesh[0] * self.mesh[1] if self.strategy.startswith("mesh-") else self.world
        return self.twin_world or data_ranks

    def hot_rank(self, step: int) -> int | None:
        """In a one-hot case each rank in turn has the only non-zero loss; elsewhere None."""
        return step % self.input_world if self.proof == "one-hot" else None

    def unsharded_twin(self) -> Case:
        """The same mathematics in one process, in one go: what links 2 and 4 compare the shards with."""
        divisor = self.world if self.proof == "one-hot" else 1
        # a twin has the same forwards: their gradients are sums, which only lattices have exact in another order
        undisturbed = {name: DEFAULTS[name] for name in WITHOUT_EFFECT} | {"link": "frameworks", "clauses": ()}
        return dataclasses.replace(
            self,
            strategy=UNSHARDED,
            world=1,
            twin_world=self.twin_world_needed,
            divide_gradients_by=divisor,
            **undisturbed,
        )

    @property
    def twin_world_needed(self) -> int:
        """One-hot batches depend on the world size; all other twins see every token at once."""
        return self.world if self.proof == "one-hot" else 1


WITHOUT_EFFECT = (
    *("param_dtype", "reduce_dtype", "late", "recompute", "resume"),
    *("replicas", "keep_gathered", "counted"),
)
"""Fields that must change no result: the wire's dtypes, which adapters are never cast to, and how a step is made."""

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Case)}
"""What a field holds where a case says nothing of it."""
