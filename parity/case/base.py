"""What every case says: which link it belongs to, who runs it where, and how its weights are held and multiplied."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from parity.case.identifier import departures

Link = Literal["algebra", "shards", "frameworks", "training", "controls"]
Model = Literal["stack", "codec", "checkpoint", "pretrained"]
Task = Literal["train", "start", "neutral", "merge", "exchange", "refuse", "decode", "offsets", "control"]
Base = Literal["float32", "bfloat16", "float64", "nf4", "fp4"]
Compute = Literal["float32", "bfloat16", "float16", "float64"]
Tolerance = Literal["bitwise", "twin", "bound", "ulp", "norm", "bits", "plain", "named"]
"""How strictly what is given is compared; `checks/expectation.py` says for each with what."""

LINKS: tuple[Link, ...] = ("algebra", "shards", "frameworks", "training", "controls")
UNSHARDED = "none"
"""The strategy of a case that one process runs without any sharding."""

TORCH_STRATEGIES = (UNSHARDED, "fsdp1", "fsdp1-orig", "fsdp1-hybrid", "fsdp2", "hsdp", "ddp", "tp", "fsdp2-tp")
"""What `torch_impl` and third parties run; all other strategies belong to a built-in subject."""


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One thing to show, about one model, under one strategy. Its class is the kind of question."""

    task: ClassVar[Task]
    """What is done."""
    model: ClassVar[Model]
    """A stack of linear layers, the 4-bit codec alone, a small Llama's packed checkpoint, or a pretrained network."""
    without_effect: ClassVar[tuple[str, ...]] = ("replicas", "tensor")
    """Fields beside the strategy that must change no result."""

    link: Link
    """The link of the argument that this case belongs to."""
    subject: str = "torch_impl"
    """The implementation that runs it; `--impl` replaces `torch_impl` only."""
    strategy: str = UNSHARDED
    """How the subject shards."""
    world: int = 1
    """The number of ranks."""
    replicas: int = 2
    """Under hsdp and fsdp1-hybrid: how many copies there are of each shard (S9)."""
    tensor: int = 2
    """Under fsdp2-tp: how many ranks share each layer's features (S10); under tp all do."""
    shape_name: str = ""
    """The name that the identifier gives the layers' shapes."""
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
    blocksize: int = 64
    """Elements that share a scale in a four-bit base (Q1)."""
    flat: bool = False
    """Whether the scales of a four-bit base are float32 themselves, and not 8-bit codes of them (Q6)."""
    compute: Compute = "float32"
    """The dtype that the layer multiplies in."""
    clauses: tuple[str, ...] = ()
    """The clauses of SPEC.md that its checks bear on."""
    seed: int = 0
    """Changes every drawn number."""

    @property
    @abstractmethod
    def tolerance(self) -> Tolerance:
        """How strictly what is given is compared."""

    @property
    @abstractmethod
    def _word(self) -> str:
        """The identifier's second word: what is asked, or what shows the answer."""

    @property
    def id(self) -> str:
        """The identifier: the same words in the same order for every case."""
        at = f"{self.strategy}-w{self.world}"
        features = [*self._said_first, *departures(self)]
        last = "+".join(features).replace("_", "-") or "plain"
        return "/".join(
            [self.model, self._word, self.subject, at, self._shape_word, f"{self.base}-{self.compute}", last]
        )

    @property
    def _said_first(self) -> tuple[str, ...]:
        """What the identifier's last part begins with, before what departs from the plain case."""
        return ()

    @property
    def _shape_word(self) -> str:
        """The identifier's word for what the model is made of."""
        return self.shape_name

    @property
    def has_twin(self) -> bool:
        """Whether its shards are compared with another run of the same implementation, and not with the oracle."""
        return self.tolerance == "twin"

    @property
    def is_exact(self) -> bool:
        """Whether nothing rounds, so that the oracle's numbers are the only right ones."""
        return self.tolerance == "bitwise"

    @property
    def scaling(self) -> float:
        """D1, as inputs need it; the oracle has the specification's own."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def copies(self) -> int:
        """On how many ranks each element lies: as many as there are rows of a mesh (S9), every rank under ddp."""
        return {"hsdp": self.replicas, "fsdp1-hybrid": self.replicas, "ddp": self.world}.get(self.strategy, 1)

    def copies_at(self, step: int) -> int:
        """The same after a step."""
        del step
        return self.copies

    @property
    def tensor_ranks(self) -> int:
        """How many of torch's ranks share each layer's features, and see the same batch (S10)."""
        return {"tp": self.world, "fsdp2-tp": self.tensor}.get(self.strategy, 1)

    def data_rank(self, rank: int) -> int:
        """Which of the batches a rank of torch's sees: tensor ranks are neighbours, and see the same one."""
        return rank // self.tensor_ranks

    def is_row_parallel(self, layer: str) -> bool:
        """S10: whether tensor ranks share the input features of a layer, and not the output ones."""
        raise NotImplementedError(f"tensor ranks have no part of {layer} in a case that asks to {self.task}")

    @property
    def mesh(self) -> tuple[int, int, int]:
        """The sizes of the axes `replicate`, `shard` and `tensor` under `mesh-RxSxT` (S9, S10)."""
        replicate, shard, tensor = map(int, self.strategy.removeprefix("mesh-").split("x"))
        return replicate, shard, tensor

    @property
    def input_world(self) -> int:
        """How many batches are dealt; tensor ranks see the same one."""
        return self.mesh[0] * self.mesh[1] if self.strategy.startswith("mesh-") else self.world // self.tensor_ranks

    def undisturbed(self, **changes: Any) -> Self:
        """The same question less all that must change no answer: sharding, link and clauses."""
        plain = {name: default_of(type(self), name) for name in self.without_effect}
        at = {"strategy": UNSHARDED, "link": "frameworks", "clauses": ()}
        return dataclasses.replace(self, **at, **plain, **changes)

    def unsharded_twin(self) -> Self:
        """The same mathematics in one process, in one go: what links 2 and 4 compare the shards with."""
        return self.undisturbed(world=1)


def default_of(kind: type[Case], name: str) -> Any:
    """What a field of a kind holds where a case says nothing of it."""
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)
