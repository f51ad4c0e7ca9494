"""The values that the specification passes around: small frozen pytrees, a sentence a field, and the error with a hint.

Axis legend, used as a suffix in every file of this room (`W_OI` has shape `(out, in)`):

    T  tokens (rows of the input)
    I  in, the input features of a linear layer
    O  out, its output features: one magnitude each (D3)
    R  rank of the adapter
    K  whatever axes a weight has beside its first

Clauses: D1 to D3 (adapter), Q1, Q6 (quant state), G1 (gradients).
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, no_type_check

from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float, UInt8

NormGradient: TypeAlias = Literal["constant", "full"]
"""Whether the backward pass holds the weight norm constant (D5) or differentiates through it (another function)."""


class InputError(ValueError):
    """A value that the specification gives no meaning to: what it was, and what to do about it."""

    def __init__(self, what: str, *, hint: str) -> None:
        self.hint = hint
        super().__init__(f"{what}; {hint}")


# `no_type_check`: JAX rebuilds pytrees around leaves that are no arrays (abstract values, sharding specifications), so
# the shapes below are promises, which the functions that take the fields apart verify.


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class Adapter:
    """D2, D3: what is trained beside one frozen weight `W_OI`."""

    lora_A: Float[Array, "R I"]  # noqa: N815 (PEFT's name)
    """The factor that reads the input; random at start."""

    lora_B: Float[Array, "O R"]  # noqa: N815 (PEFT's name)
    """The factor that writes the output; zero at start, so that the layer starts neutral (D12)."""

    magnitude: Float[Array, " O"]
    """The length m that each row of the merged weight has; the row norm of the direction at start (D6)."""


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class Layer:
    """D2, D8: one adapted linear layer with everything that its forward reads."""

    weight: Float[Array, "O I"]
    """The frozen base weight that the forward multiplies by: under QDoRA the dequantised and cast one (D6)."""

    adapter: Adapter
    """What is trained."""

    bias: Float[Array, " O"] | None
    """The frozen bias, added after scaling (D8); None where the layer has none."""

    scaling: float = field(metadata={"static": True})
    """The factor s on the product B A (D1)."""


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class NestedState:
    """Q6: how the block scales of a quantised weight are themselves stored, in eight bits each."""

    absmax: Float[Array, " blocks"]
    """One float32 scale for each `blocksize` of the outer scales."""

    code: Float[Array, "256"]
    """The signed dynamic map: the value, in [-1, 1], that each 8-bit code stands for."""

    offset: Float[Array, ""]
    """The mean taken off the outer scales before they were coded; it is data, never recomputed (Q4)."""

    blocksize: int = field(metadata={"static": True})
    """How many outer scales share one nested scale; 256 in bitsandbytes."""


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class QuantState:
    """Q1, Q4: everything beside the packed bytes that decoding a four-bit weight needs."""

    absmax: Float[Array, " blocks"] | UInt8[Array, " blocks"]
    """The scale of each block: float32, or 8-bit codes of it when `nested` says how to read them."""

    code: Float[Array, "16"]
    """The codebook: the value, in [-1, 1], that each nibble stands for."""

    nested: NestedState | None
    """How to read `absmax` when it is itself coded; None when it is plain float32."""

    blocksize: int = field(metadata={"static": True})
    """How many consecutive elements, in row-major order, share one scale; 64 in QLoRA."""

    shape: tuple[int, ...] = field(metadata={"static": True})
    """The shape of the weight that the bytes stand for, `(out, in)`."""

    dtype: str = field(default="float32", metadata={"static": True})
    """The name of the dtype that the weight had, and that decoding gives when no other is asked for."""


class PackedWeight(NamedTuple):
    """Q4: one weight as it is stored; or those of many layers, their arrays stacked."""

    packed: Array
    """The bytes, two elements each."""

    state: QuantState
    """How to decode them."""


@register_dataclass
@no_type_check
@dataclass(frozen=True)
class LayerGradients:
    """G1: the derivative of a scalar loss with respect to everything of one layer that is differentiated."""

    lora_A: Float[Array, "R I"]  # noqa: N815 (PEFT's name)
    """dL/dA, the shape of `Adapter.lora_A`."""

    lora_B: Float[Array, "O R"]  # noqa: N815 (PEFT's name)
    """dL/dB, the shape of `Adapter.lora_B`."""

    magnitude: Float[Array, " O"]
    """dL/dm, the shape of `Adapter.magnitude`."""

    x: Float[Array, "T I"]
    """dL/dx, what the layer below receives as its cotangent."""
