"""Flax's convolution with an adapter: channels last outside, first inside. D3, D8, D9."""

from typing import Any, Final

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ref import dora, layers
from ref.nnx.config import DoRAConfig
from ref.nnx.shared import (
    add_adapter,
    cast,
    channels_first,
    channels_last,
    dropout_mask,
    options_of,
    plain_layer,
    refuse_out_sharding,
    refuse_own_products,
    widened,
    with_variables_of,
)
from ref.types import Adapter, InputError

_WINDOW: Final = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count", "mask")
"""The attributes of a convolution that say where its kernel goes."""


class DoRAConv(nnx.Conv):
    """D3: nnx.Conv with an adapter, in any number of dimensions and groups, and with every padding that flax has.

    Raises:
        InputError: an input dilation or a kernel mask, which the specification has no layer for.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Any, *, config: DoRAConfig, rngs: nnx.Rngs, **conv: Any
    ) -> None:
        super().__init__(in_features, out_features, kernel_size, rngs=rngs, **conv)
        refuse_own_products(self)
        if self.mask is not None or self._each(self.input_dilation) != (1,) * len(self.kernel_size):
            raise InputError(
                "a convolution with a kernel mask or an input dilation", hint="leave it out with `targets`"
            )
        W_OK, groups = channels_first(cast(self.kernel[...], self.dtype)), self.feature_group_count
        dtype = jnp.dtype(config.param_dtype)
        factors = layers.initial_factors(rngs.params(), W_OK.shape, rank=config.rank, groups=groups, dtype=dtype)
        magnitude = dora.weight_norm(widened(W_OK, Adapter(*factors, factors[1])))  # B is 0
        add_adapter(self, Adapter(*factors, magnitude), config=config, rngs=rngs, like=self.kernel)

    @classmethod
    def from_base(cls, base: nnx.Conv, config: DoRAConfig, *, rngs: nnx.Rngs) -> "DoRAConv":
        """The layer with the base's own variables in it, and a new adapter."""
        options = {name: getattr(base, name) for name in _WINDOW} | options_of(base)
        made = cls(base.in_features, base.out_features, base.kernel_size, config=config, rngs=rngs, **options)
        return with_variables_of(base, made)

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """D3, D8, D9: `(*batch, *space, in)` to `(*batch, *places, out)`; the arithmetic is in the adapter's dtype."""
        refuse_out_sharding(out_sharding)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        adapter, batch = self.adapter, inputs.shape[: inputs.ndim - len(self.kernel_size) - 1]
        x_NI = jnp.moveaxis(inputs.reshape(-1, *inputs.shape[len(batch) :]), -1, 1)
        mask_NI = dropout_mask(self, x_NI)
        y_NO = layers.convolution(
            self._padded(widened(x_NI, adapter)),
            widened(channels_first(kernel), adapter),
            adapter,
            window=self.window,
            scaling=self.config.scaling,
            bias_O=None if bias is None else widened(bias, adapter),
            mask_NI=None if mask_NI is None else self._padded(widened(mask_NI, adapter)),
            norm_gradient=self.config.norm_gradient,
        )
        y = jnp.moveaxis(y_NO, 1, -1).astype(inputs.dtype)
        return y.reshape(*batch, *y.shape[1:])

    def merged(self) -> nnx.Conv:
        """D10: the plain layer that does the same, in the kernel's dtype."""
        W_OK, adapter = channels_first(self.kernel[...]), self.adapter
        options = {"scaling": self.config.scaling, "groups": self.feature_group_count}
        V_OK = layers.direction(widened(W_OK, adapter), adapter.lora_A, adapter.lora_B, **options)
        c_O = dora.ratio(adapter.magnitude, dora.weight_norm(V_OK))
        kernel = channels_last(c_O.reshape(-1, *(1,) * (V_OK.ndim - 1)) * V_OK)
        window = {name: getattr(self, name) for name in _WINDOW}
        return plain_layer(
            nnx.Conv, self, self.in_features, self.out_features, self.kernel_size, kernel=kernel, **window
        )

    @property
    def adapter(self) -> Adapter:
        """D2, D3: A, B and m in the specification's orientation, channels first."""
        B_OR = self.lora_b[...].T
        return Adapter(
            channels_first(self.lora_a[...]),
            B_OR.reshape(*B_OR.shape, *(1,) * len(self.kernel_size)),
            self.magnitude[...],
        )

    @property
    def window(self) -> layers.Window:
        """D3: strides and dilations; the padding has been added to the input by then."""
        zeros = (0,) * len(self.kernel_size)
        strides, dilation = self._each(self.strides), self._each(self.kernel_dilation)
        return layers.Window(strides, zeros, dilation, groups=self.feature_group_count)

    def _each(self, number: Any) -> tuple[int, ...]:
        """A number for each spatial axis."""
        return (number or 1,) * len(self.kernel_size) if isinstance(number, int | None) else tuple(number)

    def _padded(self, x_NI: Array) -> Array:
        """The input with its padding, as flax's own convolution pads it; a mask is padded like what it masks."""
        spans = [
            (size - 1) * by + 1 for size, by in zip(self.kernel_size, self._each(self.kernel_dilation), strict=True)
        ]
        mode = "constant"
        if self.padding in ("CIRCULAR", "REFLECT"):
            mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[self.padding]
            ends = [((size - 1) // 2, size // 2) for size in spans]
        elif self.padding == "CAUSAL":
            ends = [(spans[0] - 1, 0)]
        elif isinstance(self.padding, str):
            ends = lax.padtype_to_pads(x_NI.shape[2:], spans, self._each(self.strides), self.padding)
        else:
            each = (self.padding,) * len(spans) if isinstance(self.padding, int) else self.padding
            ends = [(end, end) if isinstance(end, int) else tuple(end) for end in each]
        return jnp.pad(x_NI, [(0, 0), (0, 0), *ends], mode=mode)
