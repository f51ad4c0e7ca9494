"""Linear layers of flax with an adapter: dense, of several axes, and stored in four bits. D6, D8, D10, Q4."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from ref import dora, quant, quant_fast
from ref.nnx.config import DoRAConfig, Packed
from ref.nnx.shared import (
    adapt_linear,
    cast,
    linear_adapter,
    linear_forward,
    merged_kernel,
    options_of,
    plain_layer,
    refuse_own_products,
    with_variables_of,
)
from ref.types import Adapter, InputError, QuantState


class DoRALinear(nnx.Linear):
    """D8: nnx.Linear with an adapter; arguments as there, and `config`."""

    def __init__(
        self, in_features: int, out_features: int, *, config: DoRAConfig, rngs: nnx.Rngs, **linear: Any
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        refuse_own_products(self)
        adapt_linear(self, self.weight(), config=config, rngs=rngs, like=self.kernel)

    @classmethod
    def from_base(cls, base: nnx.Linear, config: DoRAConfig, *, rngs: nnx.Rngs) -> "DoRALinear":
        """The layer with the base's own variables in it, and a new adapter."""
        made = cls(base.in_features, base.out_features, config=config, rngs=rngs, **options_of(base))
        return with_variables_of(base, made)

    def weight(self) -> Array:
        """D6: the weight that the forward multiplies by, `(out, in)`."""
        return cast(self.kernel[...], self.dtype).T

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """D8, D9: `(..., in)` to `(..., out)`, in `dtype` or what inputs and kernel promote to."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return linear_forward(self, inputs, kernel.T, bias=bias, out_sharding=out_sharding)

    def merged(self) -> nnx.Linear:
        """D10: the plain layer that does the same, in the kernel's dtype."""
        return plain_layer(nnx.Linear, self, self.in_features, self.out_features, kernel=merged_kernel(self))

    @property
    def adapter(self) -> Adapter:
        """D2: A, B and m in the specification's orientation."""
        return linear_adapter(self)


class DoRALinearGeneral(nnx.LinearGeneral):
    """D8: nnx.LinearGeneral with an adapter over its flattened features, which attention is made of.

    Raises:
        InputError: with a `batch_axis`, which would be many layers.
    """

    def __init__(
        self, in_features: Any, out_features: Any, *, config: DoRAConfig, rngs: nnx.Rngs, **linear: Any
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        refuse_own_products(self)
        if self.batch_axis:
            raise InputError("a LinearGeneral with a batch_axis is many layers", hint="leave it out with `targets`")
        adapt_linear(self, self.weight(), config=config, rngs=rngs, like=self.kernel)

    @classmethod
    def from_base(cls, base: nnx.LinearGeneral, config: DoRAConfig, *, rngs: nnx.Rngs) -> "DoRALinearGeneral":
        """The layer with the base's own variables in it, and a new adapter."""
        options = {"axis": base.axis, "batch_axis": base.batch_axis} | options_of(base)
        made = cls(base.in_features, base.out_features, config=config, rngs=rngs, **options)
        return with_variables_of(base, made)

    def weight(self) -> Array:
        """D6: the weight that the forward multiplies by, `(product of out, product of in)`."""
        return cast(self.kernel[...], self.dtype).reshape(math.prod(self.in_features), -1).T

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """D8, D9: contract the axes of the input that `axis` names."""
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        moved = jnp.moveaxis(inputs, self.axis, range(-len(self.axis), 0))
        rest = moved.shape[: inputs.ndim - len(self.axis)]
        width = math.prod(self.in_features)
        bias = None if bias is None else bias.reshape(-1)
        y = linear_forward(
            self, moved.reshape(*rest, width), kernel.reshape(width, -1).T, bias=bias, out_sharding=out_sharding
        )
        return y.reshape(*rest, *self.out_features)

    def merged(self) -> nnx.LinearGeneral:
        """D10: the plain layer that does the same, in the kernel's dtype."""
        kernel = merged_kernel(self).reshape(self.kernel.shape)
        return plain_layer(nnx.LinearGeneral, self, self.in_features, self.out_features, kernel=kernel, axis=self.axis)

    @property
    def adapter(self) -> Adapter:
        """D2: A, B and m in the specification's orientation."""
        return linear_adapter(self)


class QDoRALinear(nnx.Module):
    """Q4, D6: a linear layer whose frozen weight is stored in four bits and decoded in every forward.

    `packed` and `quant_state` are bitsandbytes' format of the weight `(out, in)`, as `quantised_checkpoint` reads it.
    `like` is a kernel `(in, out)` whose mesh axes the adapter takes over.
    """

    def __init__(
        self,
        packed: Array,
        quant_state: QuantState,
        *,
        config: DoRAConfig,
        rngs: nnx.Rngs,
        bias: Array | None = None,
        dtype: DTypeLike | None = None,
        like: nnx.Variable | None = None,
    ) -> None:
        self.out_features, self.in_features = quant_state.shape
        self.packed, self.quant_state = Packed(packed), Packed(quant_state)
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.dtype = jnp.dtype(quant_state.dtype if dtype is None else dtype)
        adapt_linear(self, self.weight(), config=config, rngs=rngs, like=like)

    @classmethod
    def from_base(cls, base: nnx.Linear, config: DoRAConfig, *, rngs: nnx.Rngs) -> "QDoRALinear":
        """The layer with the base's weight coded, by `bnb-cpu`, and its own bias variable in it.

        Raises:
            QuantizationError: a weight that is not finite or in another dtype than encoding takes (Q7).
        """
        refuse_own_products(base)
        W_OI = np.asarray(base.kernel[...]).T
        options = {"blocksize": config.blocksize, "nested": config.nested, "quant_type": config.quant_type or "nf4"}
        packed, quant_state = quant.encode(W_OI, profile="bnb-cpu", **options)
        made = cls(jnp.asarray(packed), quant_state, config=config, rngs=rngs, dtype=base.dtype, like=base.kernel)
        made.bias = base.bias
        return made

    def weight(self) -> Array:
        """Q4, D6: the weight that the forward multiplies by: decoded, then cast."""
        return quant_fast.decode(self.packed[...], self.quant_state.get_value(), dtype=self.dtype)

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """D8, D9: `(..., in)` to `(..., out)`, in `dtype`."""
        bias = None if self.bias is None else self.bias[...].astype(self.dtype)
        return linear_forward(self, inputs.astype(self.dtype), self.weight(), bias=bias, out_sharding=out_sharding)

    def merged(self) -> nnx.Linear:
        """D10: a plain layer with the merged, dequantised weight; coding it again is another step, and loses."""
        kernel = dora.merge(self.weight(), self.adapter, scaling=self.config.scaling).T.astype(self.dtype)
        made = nnx.Linear(
            self.in_features,
            self.out_features,
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=self.dtype,
            kernel_init=lambda *_: kernel,
            rngs=nnx.Rngs(0),
        )
        made.bias = self.bias
        return made

    @property
    def adapter(self) -> Adapter:
        """D2: A, B and m in the specification's orientation."""
        return linear_adapter(self)
