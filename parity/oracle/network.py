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
    """The gradient of every adapter, with 32 times its sensitivity as the limit on the 2-norm of the difference."""
    config = checkpoint.LlamaConfig.from_json(model / "config.json")
    parameters, adapters, shifts = _network(case, model, config, offsets)
    arguments = (adapters, parameters, *_batch(case, model), jnp.float64(predicted_tokens(case, model)))
    gradients = _gradients(model, dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized))
    exact, moved = responses(gradients, arguments, unit=_UNIT, seeds=_SEEDS)
    return shifts | {
        (1, "gradient", f"{name}.{factor}"): _prediction(getattr(exact[name], factor), getattr(moved[name], factor))
        for name in exact
        for factor in FACTORS
    }


@functools.lru_cache
def _gradients(model: Path, scaling: float) -> Callable[..., dict[str, Adapter]]:
    """One function for all cases of a checkpoint, so that it is compiled once."""
    config = checkpoint.LlamaConfig.from_json(model / "config.json")

    def loss(adapters: dict[str, Adapter], parameters: checkpoint.Parameters, *batch: Array) -> Array:
        tokens, targets, weights, total = batch
        options = {"weights_BS": weights, "total": total, "adapters": adapters, "scaling": scaling}
        return llama.loss(parameters, tokens, targets, config, **options)

    return jax.grad(loss)


def _prediction(value: Array, response: float) -> Prediction:
    gradient = np.asarray(value)
    reason = skip_reason(response, float(np.linalg.norm(gradient))) or ""
    return Prediction(value=gradient, limit=FACTOR * response, no_claim=reason)


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
