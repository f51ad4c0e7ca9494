"""A Llama decoder on JAX arrays, with a DoRA layer in place of each linear one that has an adapter.

Axes: L layers, B batch, S position, Z position attended to, D width, V vocabulary, H heads, K heads of keys and values,
G heads that share one of those, E features of a head, F its frequencies, O out, I in. From a Hugging Face checkpoint:

    h_BSD = embedding[tokens_BS]
    h = h + o(attention(rotated q(norm(h)), rotated k(norm(h)), v(norm(h))))     in every layer
    h = h + down(silu(gate(norm(h))) * up(norm(h)))
    logits_BSV = norm(h) head'

Grouped-query attention: arXiv:2305.13245; rotary positions: arXiv:2104.09864; RMSNorm: arXiv:1910.07467; SwiGLU:
arXiv:2002.05202. Clauses: D1 to D8 through `dora.forward`, D6 through `with_weights`, Q4 through either that or a
`PackedWeight` in place of a linear weight, which is decoded where it is used; T1 through `loss`.

Layers of one kind are stacked along L and run by `lax.scan`: thirty compile as fast as one. The backward pass computes
each again, all but norms n and products y0, so that only one layer's decoded weights are held at a time. Arithmetic
follows the parameters' dtype, and is at least float32 in norms, angles, softmax and loss.
Pass the parameters to a jitted function as an argument: closed over, they would be copied into the program.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int
from numpy.typing import NDArray

from ref import dora, quant_fast
from ref.checkpoint import LlamaConfig, Parameters
from ref.types import Adapter, InputError, PackedWeight


def loss(
    parameters: Parameters,
    tokens_BS: Int[Array, "B S"],
    targets_BS: Int[Array, "B S"],
    config: LlamaConfig,
    *,
    weights_BS: Float[Array, "B S"] | None = None,
    total: float | int | None = None,  # noqa: PYI041 - checked at run time, where an int is no float
    adapters: Mapping[str, Adapter] | None = None,
    scaling: float | None = None,
) -> Float[Array, ""]:
    """T1: the cross entropy of each position's target, weighted, summed and divided by `total`.

        L = sum_bs w_bs (log sum_v exp z_bsv - z_bs,target) / total

    Attention is causal, so short sequences may be filled up at their end with any token of weight 0.

    Args:
        parameters: see `checkpoint.read_checkpoint`.
        tokens_BS: the inputs, position 0 first.
        targets_BS: the token that follows each.
        config: of the model.
        weights_BS: 1 for every position if not given.
        total: what to divide by: 1 for the sum, all ranks' tokens under data parallelism; the sum of the weights, which
            makes it a mean, if not given.
        adapters: see `logits`.
        scaling: see `logits`.
    """
    logits_BSV = logits(parameters, tokens_BS, config, adapters=adapters, scaling=scaling)
    logits_BSV = _wide(logits_BSV)
    picked_BS = jnp.take_along_axis(logits_BSV, targets_BS[:, :, None], axis=2)[:, :, 0]
    entropy_BS = jax.nn.logsumexp(logits_BSV, axis=2) - picked_BS
    weights_BS = jnp.ones_like(entropy_BS) if weights_BS is None else weights_BS.astype(entropy_BS.dtype)

    return jnp.sum(weights_BS * entropy_BS) / (jnp.sum(weights_BS) if total is None else total)


def logits(
    parameters: Parameters,
    tokens_BS: Int[Array, "B S"],
    config: LlamaConfig,
    *,
    adapters: Mapping[str, Adapter] | None = None,
    scaling: float | None = None,
    inverse_frequencies_F: Float[Array, " F"] | None = None,
) -> Float[Array, "B S V"]:
    """The decoder's scores for the token that follows each position.

    Args:
        parameters: see `checkpoint.read_checkpoint`; as many layers are run as they hold.
        tokens_BS: the inputs; position 0 first, attention causal.
        config: of the model.
        adapters: by the layer's Hugging Face name ("model.layers.0.self_attn.q_proj"); a linear layer that has one is
            a DoRA layer (D2 to D8). A projection has one in every layer or in none, all of one rank. Or by the name
            inside a layer ("mlp.up_proj"), stacked along L already, as `finetune.initial_adapters` gives them.
        scaling: D1, of all adapters; has to be given where they are.
        inverse_frequencies_F: in place of `inverse_frequencies(config)`.

    Raises:
        InputError: an adapter's name is no linear layer, or only some layers of a projection have one; no scaling.
    """
    if adapters and scaling is None:
        raise InputError("adapters without their scaling", hint="give scaling=dora.scaling(alpha, rank) (D1)")
    frequencies_F = jnp.asarray(inverse_frequencies(config)) if inverse_frequencies_F is None else inverse_frequencies_F
    rotation = _rotation(tokens_BS.shape[1], frequencies_F, parameters.norm.dtype)
    stacked = _stacked_adapters(adapters or {}, parameters)

    def block(h_BSD: Array, slices: tuple[dict[str, Any], dict[str, Adapter]]) -> tuple[Array, None]:
        layer = _Layer(*slices, scaling=0.0 if scaling is None else scaling, config=config)
        return layer.feed_forward(layer.attention(h_BSD, rotation)), None

    h_BSD = parameters.embedding[tokens_BS]
    kept = jax.checkpoint_policies.save_only_these_names("y0", "n")  # as `dora` names them
    h_BSD, _ = lax.scan(jax.checkpoint(block, prevent_cse=False, policy=kept), h_BSD, (parameters.layers, stacked))
    head_VD = parameters.embedding if parameters.head is None else parameters.head

    return rms_norm(h_BSD, parameters.norm, eps=config.rms_norm_eps) @ head_VD.T


@dataclass(frozen=True)
class _Layer:
    """One decoder block: its tensors and adapters by the name inside it."""

    tensors: dict[str, Array | PackedWeight]
    adapters: dict[str, Adapter]
    scaling: float
    config: LlamaConfig

    def linear(self, x_BSI: Float[Array, "B S I"], name: str) -> Float[Array, "B S O"]:
        """Give x W' + b, or the DoRA layer where there is an adapter (D8)."""
        W_OI, bias_O = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        W_OI = quant_fast.decode(*W_OI, dtype=x_BSI.dtype) if isinstance(W_OI, PackedWeight) else W_OI
        if name not in self.adapters:
            y_BSO = x_BSI @ W_OI.T
            return y_BSO if bias_O is None else y_BSO + bias_O[None, None, :]
        x_TI = x_BSI.reshape(-1, x_BSI.shape[2])
        y_TO = dora.forward(x_TI, W_OI, self.adapters[name], scaling=self.scaling, bias_O=bias_O)
        return y_TO.reshape(*x_BSI.shape[:2], -1)

    def norm(self, h_BSD: Float[Array, "B S D"], name: str) -> Float[Array, "B S D"]:
        """One of the block's two norms."""
        return rms_norm(h_BSD, self.tensors[f"{name}.weight"], eps=self.config.rms_norm_eps)

    def attention(self, h_BSD: Float[Array, "B S D"], rotation: tuple[Array, Array]) -> Float[Array, "B S D"]:
        """Add o(softmax(q k' / sqrt(E)) v), heads in groups of G on each of K keys and values, to h."""
        x_BSD = self.norm(h_BSD, "input_layernorm")
        q_BSHE, k_BSKE, v_BSKE = (self._heads(x_BSD, name) for name in ("q_proj", "k_proj", "v_proj"))
        mixed_BSHE = attend(rotate(q_BSHE, *rotation), rotate(k_BSKE, *rotation), v_BSKE)
        return h_BSD + self.linear(mixed_BSHE.reshape(*h_BSD.shape[:2], -1), "self_attn.o_proj")

    def feed_forward(self, h_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Add down(silu(gate(x)) * up(x)) to h."""
        x_BSD = self.norm(h_BSD, "post_attention_layernorm")
        gated = jax.nn.silu(self.linear(x_BSD, "mlp.gate_proj")) * self.linear(x_BSD, "mlp.up_proj")
        return h_BSD + self.linear(gated, "mlp.down_proj")

    def _heads(self, x_BSD: Array, name: str) -> Array:
        return self.linear(x_BSD, f"self_attn.{name}").reshape(*x_BSD.shape[:2], -1, self.config.head_dim)


def attend(
    q_BSHE: Float[Array, "B S H E"], k_BZKE: Float[Array, "B Z K E"], v_BZKE: Float[Array, "B Z K E"]
) -> Float[Array, "B S H E"]:
    """Causal softmax attention, H / K neighbouring heads on each key and value (arXiv:2305.13245)."""
    B, S, H, E = q_BSHE.shape
    q_BSKGE = q_BSHE.reshape(B, S, k_BZKE.shape[2], -1, E)
    scores = _wide(jnp.einsum("bskge,bzke->bkgsz", q_BSKGE, k_BZKE)) * E**-0.5
    future_SZ = jnp.arange(S)[None, :] > jnp.arange(S)[:, None]
    shares = jax.nn.softmax(jnp.where(future_SZ[None, None, None], -jnp.inf, scores), axis=-1)

    return jnp.einsum("bkgsz,bzke->bskge", shares.astype(v_BZKE.dtype), v_BZKE).reshape(B, S, H, E)


def rms_norm(h_BSD: Float[Array, "B S D"], weight_D: Float[Array, " D"], *, eps: float) -> Float[Array, "B S D"]:
    """`w * h / sqrt(mean(h^2) + eps)` (arXiv:1910.07467), rounded to the dtype of h before w multiplies it."""
    wide_BSD = _wide(h_BSD)
    scale_BS1 = lax.rsqrt(jnp.mean(wide_BSD * wide_BSD, axis=-1, keepdims=True) + eps)

    return weight_D[None, None, :] * (wide_BSD * scale_BS1).astype(h_BSD.dtype)


def rotate(
    x_BSHE: Float[Array, "B S H E"], cos_SE: Float[Array, "S E"], sin_SE: Float[Array, "S E"]
) -> Float[Array, "B S H E"]:
    """Turn each pair (e, e + E/2) of a head's features by its position's angle (arXiv:2104.09864, section 3.4)."""
    first, second = jnp.split(x_BSHE, 2, axis=-1)
    turned_BSHE = jnp.concatenate([-second, first], axis=-1)

    return x_BSHE * cos_SE[None, :, None, :] + turned_BSHE * sin_SE[None, :, None, :]


def _rotation(length: int, frequencies_F: Array, dtype: jnp.dtype) -> tuple[Float[Array, "S E"], Float[Array, "S E"]]:
    """Cosine and sine of position times frequency, in the model's dtype or float32 if that is narrower."""
    frequencies_F = frequencies_F.astype(_wide_dtype(dtype))
    angles_SF = jnp.arange(length, dtype=frequencies_F.dtype)[:, None] * frequencies_F[None, :]
    angles_SE = jnp.concatenate([angles_SF, angles_SF], axis=1)

    return jnp.cos(angles_SE).astype(dtype), jnp.sin(angles_SE).astype(dtype)


def inverse_frequencies(config: LlamaConfig) -> NDArray[np.float32]:
    """`theta^(-2 f / E)` for each pair f, kept in float32 in every model, as transformers keeps them."""
    exponents_F = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers_F = (np.float64(config.rope["rope_theta"]) ** exponents_F.astype(np.float64)).astype(np.float32)

    return _ROPE[config.rope["rope_type"]](np.float32(1) / powers_F, config.rope).astype(np.float32)


def _llama3(plain_F: NDArray[np.float32], rope: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, and those between blended."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns_F = rope["original_max_position_embeddings"] * plain_F.astype(np.float64) / (2 * math.pi)
    kept_F = np.clip((turns_F - low) / (high - low), 0, 1)

    return (1 - kept_F) * plain_F / factor + kept_F * plain_F


_ROPE: Final = {
    "default": lambda plain_F, _: plain_F,
    "linear": lambda plain_F, rope: plain_F / rope["factor"],
    "llama3": _llama3,
}


def with_weights(parameters: Parameters, weights: Mapping[str, Float[Array, "O I"]]) -> Parameters:
    """D6, Q4: the same parameters with other weights for some linear layers: under QDoRA the dequantised ones.

    Args:
        parameters: of the whole model.
        weights: by the layer's Hugging Face name ("model.layers.0.mlp.up_proj"), cast to the parameters' dtype.

    Raises:
        InputError: a name that is no linear layer.
    """
    layers = dict(parameters.layers)
    for name, chosen in _by_projection(weights, _count(parameters), parameters.layers).items():
        stacked = layers[f"{name}.weight"]
        parts = [stacked[k] if w is None else w.astype(stacked.dtype) for k, w in enumerate(chosen)]
        layers[f"{name}.weight"] = jnp.stack(parts)

    return Parameters(parameters.embedding, layers, parameters.norm, parameters.head)


def _stacked_adapters(adapters: Mapping[str, Adapter], parameters: Parameters) -> dict[str, Adapter]:
    """The adapters of each projection, stacked along L."""
    projections = {name.removesuffix(".weight") for name in parameters.layers if name.endswith("_proj.weight")}
    stacked = {name: adapter for name, adapter in adapters.items() if name in projections}
    single = {name: adapter for name, adapter in adapters.items() if name not in stacked}
    for name, chosen in _by_projection(single, _count(parameters), parameters.layers).items():
        gaps = [f"model.layers.{layer}.{name}" for layer, adapter in enumerate(chosen) if adapter is None]
        if gaps:
            raise InputError(
                f"{gaps[0]} has no adapter, other layers have", hint="give a projection's adapters for all"
            )
        stacked[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)

    return stacked


def _by_projection(named: Mapping[str, Any], count: int, tensors: Mapping[str, Array]) -> dict[str, list[Any]]:
    """What is given by layer name, for each projection in the order of the layers, None where nothing is."""
    projections = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    places = {f"model.layers.{layer}.{name}": (name, layer) for name in projections for layer in range(count)}
    grouped: dict[str, list[Any]] = {}
    for name, value in named.items():
        if name not in places:
            raise InputError(
                f"{name!r} is no linear layer of this model", hint=f"give names like {next(iter(places))!r}"
            )
        projection, layer = places[name]
        grouped.setdefault(projection, [None] * count)[layer] = value

    return grouped


def _count(parameters: Parameters) -> int:
    """L."""
    return parameters.layers["input_layernorm.weight"].shape[0]


def _wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The wider of the dtype and float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < jnp.finfo(jnp.float32).bits else jnp.dtype(dtype)


def _wide(x: Array) -> Array:
    return x.astype(_wide_dtype(x.dtype))
