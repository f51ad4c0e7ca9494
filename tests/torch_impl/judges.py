"""What layers of every kind are compared with, on the same numbers in float64: `ref`'s closed forms, and peft's layers.

Both give y and the gradients by name, as `reference.run` does.
"""

import warnings
from dataclasses import replace

import jax
import numpy as np
import torch
from jax import Array
from peft import LoraConfig, get_peft_model
from reference import Inputs
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ref import dora, gradients, layers
from ref.layers import Window
from ref.types import Adapter


class GivenMask(nn.Module):
    """In the place of peft's dropout: a mask that was drawn elsewhere."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Mask * x."""
        return x * self.mask


def ref_linear(it: Inputs, *, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The reference's linear layer."""
    with jax.enable_x64(True):
        adapter, mask_TI = _adapter(it), None if mask is None else _array(mask)
        x, W, b = _array(it.x), _array(it.W), None if it.b is None else _array(it.b)
        y = dora.forward(x, W, adapter, scaling=it.scaling, bias_O=b, mask_TI=mask_TI)
        found = gradients.closed_form(x, W, adapter, G_TO=_array(it.G), scaling=it.scaling, mask_TI=mask_TI)
        return _named(y, found.lora_A, found.lora_B, found.magnitude, found.x)


def ref_layer(module: nn.Module, it: Inputs, *, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The reference's layer of the module's kind."""
    if isinstance(module, nn.Embedding):
        return _ref_embedding(it, padding_idx=module.padding_idx)
    if isinstance(module, nn.Linear | Conv1D):
        flat = {"x": it.x.flatten(0, -2), "G": it.G.flatten(0, -2), "W": it.W.T if isinstance(module, Conv1D) else it.W}
        found = ref_linear(replace(it, **flat), mask=None if mask is None else mask.flatten(0, -2))
        return found | {"y": found["y"].reshape(it.G.shape), "x": found["x"].reshape(it.x.shape)}
    return _ref_convolution(module, it, mask=mask)


def _ref_embedding(it: Inputs, *, padding_idx: int | None) -> dict[str, Tensor]:
    with jax.enable_x64(True):
        ids, W, adapter = _array(it.x.flatten()), _array(it.W), _adapter(it)
        options = {"scaling": it.scaling, "padding_idx": padding_idx}
        y = layers.embedding(ids, W, adapter, **options)
        found = layers.embedding_closed_form(ids, W, adapter, G_TD=_array(it.G.flatten(0, -2)), **options)
        named = _named(y, found.lora_A, found.lora_B, found.magnitude)
    return named | {"y": named["y"].reshape(it.G.shape)}


def _ref_convolution(module: nn.Module, it: Inputs, *, mask: Tensor | None) -> dict[str, Tensor]:
    """The reference pads with equal zeros alone: here all padding is laid around x before, and taken off dx after."""
    x = it.x.double().requires_grad_()
    padded = _padded(module, x)
    padded_mask = None if mask is None else _array(_padded(module, mask.double()))
    window = Window(module.stride, (0,) * len(module.stride), module.dilation, module.groups)
    with jax.enable_x64(True):
        inputs, options = (
            (_array(padded.detach()), _array(it.W), _adapter(it)),
            {"window": window, "mask_NI": padded_mask},
        )
        b = None if it.b is None else _array(it.b)
        y = layers.convolution(*inputs, scaling=it.scaling, bias_O=b, **options)
        found = layers.convolution_closed_form(*inputs, G_NO=_array(it.G), scaling=it.scaling, **options)
        named = _named(y, found.lora_A, found.lora_B, found.magnitude, found.x)
    padded.backward(named["x"])
    return named | {"x": x.grad}


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    """Torch's own padding: it keeps the widths of both ends."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def peft(module: nn.Module, it: Inputs, *, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Peft's DoRA around `module`, which is given the weight and bias as they are stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of what it mends, fan_in_fan_out say
        rank = it.B.shape[1]
        config = LoraConfig(r=rank, lora_alpha=it.scaling * rank, target_modules=["0"], use_dora=True)
        model = get_peft_model(nn.Sequential(module), config).double().train()
    layer = model.base_model.model[0]
    if mask is not None:
        layer.lora_dropout["default"] = GivenMask(mask.double())
    trained = _peft_factors(layer)
    places = [(layer.base_layer.weight, it.W), *zip(trained, (it.A, it.B, it.m), strict=True)]
    with torch.no_grad():
        for parameter, value in places if it.b is None else [*places, (layer.base_layer.bias, it.b)]:
            parameter.copy_(value.reshape(parameter.shape))
    x = it.x.double().requires_grad_() if it.x.is_floating_point() else it.x
    y = model(x)
    y.backward(it.G.double())
    A, B, m = (parameter.grad.reshape(like.shape) for parameter, like in zip(trained, (it.A, it.B, it.m), strict=True))
    return {"y": y.detach(), "A": A, "B": B, "m": m, **({"x": x.grad} if x.is_floating_point() else {})}


def _peft_factors(layer: nn.Module) -> list[nn.Parameter]:
    """A, B and m, under whatever names this kind of layer has them."""
    embeds = "default" in layer.lora_embedding_A
    names = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    factors = [getattr(layer, name)["default"] for name in names]
    return [*(f if embeds else f.weight for f in factors), layer.lora_magnitude_vector["default"].weight]


def _adapter(it: Inputs) -> Adapter:
    return Adapter(_array(it.A), _array(it.B), _array(it.m))


def _array(tensor: Tensor) -> Array:
    """The same numbers in float64, or integers as they are."""
    return jax.numpy.asarray((tensor.double() if tensor.is_floating_point() else tensor).numpy())


def _named(*arrays: Array) -> dict[str, Tensor]:
    """Y and the gradients; x has none where it isn't given."""
    return {k: torch.from_numpy(np.array(a)) for k, a in zip(("y", "A", "B", "m", "x"), arrays, strict=False)}
