"""The oracle of a pretrained network: the reference Llama in float64, and how far rounding moves each gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity.case import NetworkCase
from parity.inputs.network import adapter_factors, predicted_tokens, sequences, starting_magnitude
from parity.oracle.prediction import Prediction, Predictions
from parity.oracle.sensitivity import FACTOR, responses, skip_reason
from parity.oracle.stack import FACTORS
from parity.oracle.weights import offset_and_bound, weight_used
from ref import checkpoint, dora, llama
from ref.types import Adapter

_UNIT = 2.0**-24
"""The unit roundoff of float32, which the networks compute in."""
_SEEDS = tuple(range(4))
"""Fixed: the root mean square of four responses; the factor of 32 also covers their scatter (docs/tolerances.md, 4)."""


Offsets = dict[str, float]
"""By linear layer: what its scales were shifted by before they were coded (Q4: it is data)."""


def predict_network(case: NetworkCase, model: Path, offsets: Offsets) -> Predictions:
    """Every adapter's gradient and each sequence's loss, with 32 times their sensitivity as limit on the 2-norm."""
    config = checkpoint.LlamaConfig.from_json(model / "config.json")
    parameters, adapters, shifts = _network(case, model, config, offsets)
    arguments = (adapters, parameters, *_batch(case, model), jnp.float64(predicted_tokens(case, model)))
    function = _gradients(model, dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized))
    (exact, losses), (moved, loss_moved) = responses(function, arguments, unit=_UNIT, seeds=_SEEDS)
    predictions = {
        (1, "gradient", f"{name}.{factor}"): _prediction(getattr(exact[name], factor), getattr(moved[name], factor))
        for name in exact
        for factor in FACTORS
    }
    return shifts | predictions | {(1, "loss", "loss"): _prediction(losses, loss_moved)}


@functools.lru_cache
def _gradients(model: Path, scaling: float) -> Callable[..., tuple[dict[str, Adapter], Array]]:
    """One function for all cases of a checkpoint, so that it is compiled once: gradients, and the losses of ranks.

    Each rank has a sequence, and backpropagates the world size times its part of the mean (S3).
    """
    config = checkpoint.LlamaConfig.from_json(model / "config.json")

    def loss(adapters: dict[str, Adapter], parameters: checkpoint.Parameters, *batch: Array) -> tuple[Array, Array]:
        tokens, targets, weights, total = batch

        def part(tokens: Array, targets: Array, weights: Array) -> Array:
            options = {"weights_BS": weights[None], "total": total, "adapters": adapters, "scaling": scaling}
            return llama.loss(parameters, tokens[None], targets[None], config, **options)

        parts = jax.vmap(part)(tokens, targets, weights)
        return parts.sum(), parts * len(parts)

    return jax.grad(loss, has_aux=True)


def _prediction(value: Array, response: float) -> Prediction:
    exact = np.asarray(value)
    reason = skip_reason(response, float(np.linalg.norm(exact))) or ""
    return Prediction(value=exact, limit=FACTOR * response, no_claim=reason)


def _network(
    case: NetworkCase, model: Path, config: checkpoint.LlamaConfig, offsets: Offsets
) -> tuple[checkpoint.Parameters, dict[str, Adapter], Predictions]:
    """The network's weights as the forward uses them (D6), the case's adapters, in float64, and what offsets may be."""
    parameters = checkpoint.read_checkpoint(model, dtype=jnp.float64, layers=case.blocks)
    weights = checkpoint.by_name(parameters)
    adapters, used, shifts = {}, {}, {}
    for name in checkpoint.linear_names(config, layers=case.blocks):
        weight = np.asarray(weights[f"{name}.weight"], dtype=np.float32)
        used[name] = weight_used(case, weight, offset=offsets.get(name))
        adapters[name] = _adapter(case, name, used[name])
        if case.base == "nf4":
            mean, bound = offset_and_bound(weight)
            shifts[0, "offset", name] = Prediction(value=np.array(mean), limit=np.array(bound))
    return llama.with_weights(parameters, used), adapters, shifts


def _adapter(case: NetworkCase, name: str, weight: Array) -> Adapter:
    """D6, then the pattern: the magnitude that both sides start from is a float32 number."""
    fan_out, fan_in = weight.shape
    lora_A, lora_B = (
        jnp.asarray(factor, dtype=jnp.float64) for factor in adapter_factors(case, name, fan_in=fan_in, fan_out=fan_out)
    )
    norm = dora.initial_magnitude(
        weight, lora_A, lora_B, scaling=dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
    )
    magnitude = starting_magnitude(np.asarray(norm))
    return Adapter(lora_A, lora_B, jnp.asarray(magnitude, dtype=jnp.float64))


def _batch(case: NetworkCase, model: Path) -> tuple[Array, Array, Array]:
    """Every rank's sequence as a row: inputs, next tokens, and weights that are zero on the padding."""
    texts = sequences(case, model)
    longest = max(len(text) for text in texts) - 1
    rows = [np.pad(text, (0, longest + 1 - len(text))) for text in texts]
    weights = [np.arange(longest) < len(text) - 1 for text in texts]
    batch = jnp.asarray(np.stack(rows))
    return batch[:, :-1], batch[:, 1:], jnp.asarray(np.stack(weights), dtype=jnp.float64)
