"""What adapted flax modules have in common: three variables, dropout's mask, and the way back. D6, D9, D10, D12."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from ref import dora, layers
from ref.nnx.config import DoRAConfig, DoRAParam
from ref.types import Adapter, InputError


def adapt_linear(module: Any, W_OI: Array, *, config: DoRAConfig, rngs: nnx.Rngs, like: nnx.Variable | None) -> None:
    """D6, D12: factors as PEFT draws them, and the magnitude of the weight that is used."""
    dtype = jnp.dtype(config.param_dtype)
    factors = layers.initial_factors(rngs.params(), W_OI.shape, rank=config.rank, dtype=dtype)
    magnitude = dora.initial_magnitude(W_OI, *factors, scaling=config.scaling)
    add_adapter(module, Adapter(*factors, magnitude), config=config, rngs=rngs, like=like)


def add_adapter(
    module: Any, adapter: Adapter, *, config: DoRAConfig, rngs: nnx.Rngs | None, like: nnx.Variable | None
) -> None:
    """The three variables in flax's orientation, laid out on a mesh as the kernel's own axes are."""
    module.config = config
    axes = _axes(like, ndim=max(2, adapter.lora_A.ndim))
    known = {} if like is None or not axes else layout_of(like)
    on = [known | ({"out_sharding": part} if axes else {}) for part in _parts(axes)]
    lora_a = channels_last(adapter.lora_A) if adapter.lora_A.ndim > 2 else adapter.lora_A.T  # noqa: PLR2004 (a matrix)
    module.lora_a = DoRAParam(lora_a, **on[0])
    module.lora_b = DoRAParam(adapter.lora_B.reshape(adapter.lora_B.shape[:2]).T, **on[1])
    module.magnitude = DoRAParam(adapter.magnitude, **on[2])
    with_dropout = config.dropout_rate and rngs is not None
    module.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs) if with_dropout else nnx.data(None)


def _axes(like: nnx.Variable | None, *, ndim: int) -> tuple[Any, ...] | None:
    """The mesh axes of the kernel's dims, where it has any and they are those of the factors."""
    spec = None if like is None else like.get_metadata().get("out_sharding")

    return None if not spec or len(like.shape) != ndim else (*spec, *(None,) * (ndim - len(spec)))


def _parts(axes: tuple[Any, ...] | None) -> tuple[tuple[Any, ...], ...]:
    """S10: lora_a is cut as the kernel's input is, lora_b and the magnitude as its output."""
    return ((*axes[:-1], None), (None, axes[-1]), (axes[-1],)) if axes else ((), (), ())


def layout_of(variable: nnx.Variable | None) -> dict[str, Any]:
    """S10: the part of a variable's metadata that says where it lies on a mesh."""
    known = {} if variable is None else variable.get_metadata()

    return {name: known[name] for name in ("out_sharding", "mesh", "sharding_rules") if known.get(name)}


def linear_forward(module: Any, inputs: Array, W_OI: Array, *, bias: Array | None, out_sharding: None) -> Array:
    """D8, D9: `dora.forward` on the last axis."""
    refuse_out_sharding(out_sharding)
    x_TI = inputs.reshape(-1, inputs.shape[-1])
    y_TO = dora.forward(
        x_TI,
        W_OI,
        linear_adapter(module),
        scaling=module.config.scaling,
        bias_O=bias,
        mask_TI=dropout_mask(module, x_TI),
        norm_gradient=module.config.norm_gradient,
    )

    return y_TO.reshape(*inputs.shape[:-1], -1)


def dropout_mask(module: Any, x: Array) -> Array | None:
    """D9: what dropout makes of ones; None where nothing can be dropped."""
    dropout = module.dropout

    return None if dropout is None or dropout.deterministic else dropout(jnp.ones_like(x))


def linear_adapter(module: Any) -> Adapter:
    """D2: A, B and m of a linear layer in the specification's orientation."""
    return Adapter(module.lora_a[...].T, module.lora_b[...].T, module.magnitude[...])


def merged_kernel(module: Any) -> Array:
    """D10: the merged weight of a linear layer as a kernel, `(in, out)`, in the adapter's dtype."""
    W_OI = module.kernel[...].reshape(module.lora_a.shape[0], -1).T

    return dora.merge(W_OI, linear_adapter(module), scaling=module.config.scaling).T


def options_of(base: Any) -> dict[str, Any]:
    """What a layer of the same type is made with, its kernel and bias given."""
    bias = None if base.bias is None else base.bias[...]
    return {
        "use_bias": base.use_bias,
        "dtype": base.dtype,
        "param_dtype": base.param_dtype,
        "kernel_init": lambda *_: base.kernel[...],
        "bias_init": lambda *_: bias,
        "kernel_metadata": layout_of(base.kernel),
        "bias_metadata": layout_of(base.bias),
        "promote_dtype": base.promote_dtype,
        "precision": base.precision,
        "preferred_element_type": base.preferred_element_type,
    }


def with_variables_of(base: Any, made: Any) -> Any:
    """The second layer with the first one's own kernel and bias in it."""
    made.kernel, made.bias = base.kernel, base.bias

    return made


def plain_layer(kind: Any, module: Any, *sizes: Any, kernel: Array, **options: Any) -> Any:
    """A layer of the base's type with another kernel and the same bias."""
    kernel = kernel.astype(module.kernel.dtype)
    made = kind(*sizes, rngs=nnx.Rngs(0), **options_of(module) | options | {"kernel_init": lambda *_: kernel})
    made.bias = module.bias

    return made


def refuse_own_products(module: Any) -> None:
    """Refuse a layer that multiplies in a way of its own.

    Raises:
        InputError: where it has a precision, a result type or a product function.
    """
    own = [name for name in ("precision", "preferred_element_type", "dot_general_cls") if getattr(module, name, None)]
    default = {"dot_general": (lax.dot_general, None), "conv_general_dilated": (lax.conv_general_dilated,)}
    own += [name for name, known in default.items() if getattr(module, name, known[0]) not in known]
    if own:
        raise InputError(
            f"{type(module).__name__} has its own {', '.join(own)}",
            hint="the specification's products are JAX's default",
        )


def refuse_out_sharding(out_sharding: None) -> None:
    """Refuse the argument that flax's own layers take, where it is used.

    Raises:
        InputError: where it is not None.
    """
    if out_sharding is not None:
        raise InputError(f"out_sharding {out_sharding} is not known here", hint="constrain the output instead")


def cast(weight: Array, dtype: DTypeLike | None) -> Array:
    """D6: the weight in the compute dtype, if one is named."""
    return weight if dtype is None else weight.astype(dtype)


def widened(x: Array, adapter: Adapter) -> Array:
    """The same numbers in the adapter's dtype, where that is the wider one."""
    wide = adapter.lora_B.dtype

    return x.astype(wide) if jnp.finfo(x.dtype).bits < jnp.finfo(wide).bits else x


def channels_first(kernel: Array) -> Array:
    """`(*window, in, out)` to `(out, in, *window)`."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1))


def channels_last(W_OK: Array) -> Array:
    """`(out, in, *window)` to `(*window, in, out)`."""
    return jnp.moveaxis(W_OK, (0, 1), (-1, -2))
