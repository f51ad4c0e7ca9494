"""What all adapted flax modules share with their user: types of variables, filters, one configuration. D1, D9."""

from dataclasses import dataclass
from typing import Final, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ref import dora
from ref.types import InputError, NormGradient


class DoRAParam(nnx.LoRAParam):
    """What is trained: `lora_a`, `lora_b` and `magnitude`; flax's own filters for LoRA find it, too."""


class Packed(nnx.Variable):
    """What is neither trained nor floating: packed bytes, and the state that decodes them (Q1)."""


TRAINABLE: Final = DoRAParam
"""The filter for `wrt=` of an optimizer and for `nnx.DiffState`."""

FROZEN: Final = nnx.Not(DoRAParam)
"""The filter for everything else."""


@dataclass(frozen=True)
class DoRAConfig:
    """How layers are adapted: one configuration for all of them."""

    rank: int
    """R, 1 or more."""

    alpha: float
    """The scaling's numerator (D1)."""

    rank_stabilized: bool = False
    """Whether the scaling divides by the root of the rank (D1)."""

    dropout_rate: float = 0.0
    """With what probability a number that the adapter reads is dropped (D9)."""

    norm_gradient: NormGradient = "constant"
    """Whether the norm is a constant of the backward pass (D5)."""

    param_dtype: DTypeLike = "float32"
    """Of A, B and the magnitude: float32 or wider (D11)."""

    quant_type: Literal["nf4", "fp4"] | None = None
    """Q2: in which code `apply_dora` stores the weights of linear layers; None leaves them as they are."""

    blocksize: int = 64
    """Q1: how many weights share a scale."""

    nested: bool = True
    """Q6: whether the scales are coded, too."""

    def __post_init__(self) -> None:
        """Refuse what no layer could be made with.

        Raises:
            InputError: a rank, alpha, rate, norm_gradient or dtype outside its range.
        """
        dora.scaling(self.alpha, self.rank)
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate {self.dropout_rate} is no probability below 1", hint="0 keeps everything")
        if self.norm_gradient not in ("constant", "full"):
            raise InputError(f"norm_gradient {self.norm_gradient!r} is unknown", hint="give 'constant' (D5) or 'full'")
        if jnp.finfo(self.param_dtype).bits < jnp.finfo(jnp.float32).bits:
            raise InputError(f"param_dtype {self.param_dtype} is too narrow", hint="give float32 or wider (D11)")

    @property
    def scaling(self) -> float:
        """D1: s."""
        return dora.scaling(self.alpha, self.rank, rank_stabilized=self.rank_stabilized)
