"""Questions about steps of an optimizer (T1 to T6): how a step is made, and what it is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from parity.case.base import Case, Compute, Task

LEARNING_RATE = 2.0**-4
"""Of a stack. Dyadic, so that the first update of a lattice case is exact."""


@dataclass(frozen=True, kw_only=True)
class SteppedCase(Case):
    """Forward, backward and update, of a stack or of a pretrained network."""

    task: ClassVar[Task] = "train"
    without_effect: ClassVar[tuple[str, ...]] = (
        *Case.without_effect,
        *("param_dtype", "reduce_dtype", "late", "recompute", "resume", "keep_gathered", "counted", "units"),
    )
    """The wire's dtypes, which adapters are never cast to, and how a step is made."""

    inputs: Literal["lattice", "one-hot", "gaussian", "text"] = "gaussian"
    """What the ranks see. With `one-hot` each rank in turn has the only loss that is not zero."""
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
    recompute: bool = False
    """Whether activations are computed again in the backward pass (T5)."""
    resume: str = ""
    """Halfway the run is saved, read into a fresh model, and goes on under this strategy (T6, S12)."""
    keep_gathered: bool = False
    """Whether what was gathered for the forward is kept for the backward (`reshard_after_forward=False`)."""
    param_dtype: Compute | None = None
    """What FSDP casts the dense base weight to on the wire; None leaves it."""
    reduce_dtype: Compute | None = None
    """What FSDP reduces gradients of anything but adapters in (T4); None leaves it."""
    units: Literal["", "block", "layer"] = ""
    """What is gathered together (S7); empty is what the strategy has by itself."""
    compiled: bool = False
    """Whether each block is given to a compiler as one graph; the twin's are as well, since kernels may differ."""
    counted: bool = False
    """Whether the collectives of each step are counted (S7, S9, S11, T5)."""
    twin_world: int = 0
    """For an unsharded twin: the world size whose batches it sees."""
    divide_gradients_by: int = 1
    """For an unsharded twin of a one-hot case: the world size that its gradients are divided by."""

    @property
    def learning_rate(self) -> float:
        """What a step is multiplied by."""
        return LEARNING_RATE

    @property
    def momentum(self) -> float:
        """SGD's momentum (T3)."""
        return 0.5

    @property
    def weight_decay(self) -> float:
        """AdamW's."""
        return 2.0**-6

    @property
    def unit_rule(self) -> str:
        """S7: `block` or `layer`."""
        return self.units or ("block" if self.strategy in {"fsdp2", "hsdp", "fsdp2-tp"} else "layer")

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

    def copies_at(self, step: int) -> int:
        """On how many ranks each element lies after a step: a resumed case may go on under another strategy."""
        if step <= self.resumes_after:
            return self.copies
        return dataclasses.replace(self, strategy=self.resume).copies

    @property
    def input_world(self) -> int:
        """How many batches are dealt; the twin sees those of the case it stands beside."""
        return self.twin_world or super().input_world

    def hot_rank(self, step: int) -> int | None:
        """In a one-hot case each rank in turn has the only non-zero loss; elsewhere None."""
        return step % self.input_world if self.inputs == "one-hot" else None

    def unsharded_twin(self) -> Self:
        """One-hot batches depend on the world size; all other twins see every token at once.

        A twin has the same forwards: their gradients are sums, which only lattices have exact in another order.
        """
        batches = self.input_world if self.inputs == "one-hot" else 1
        return self.undisturbed(world=1, twin_world=batches, divide_gradients_by=batches)
