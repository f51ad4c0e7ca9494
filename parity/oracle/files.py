"""The oracle of merged weights (D10), and of what adapter files hold (C1): the numbers that went into them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from parity import bounds
from parity.case import Case
from parity.inputs import stack_inputs
from parity.oracle.prediction import Prediction, Predictions
from parity.oracle.stack import FACTORS, stack_arrays
from ref import dora


def predict_merged(case: Case) -> Predictions:
    """`c * V` of each layer in float64, with the bound of a float32 one; rounded once more to the base's dtype."""
    weights, _, adapters = stack_arrays(case)
    scaling = dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
    predictions: Predictions = {}
    for position, (weight, adapter) in enumerate(zip(weights, adapters, strict=True)):
        value = np.asarray(dora.merge(weight, adapter, scaling=scaling))
        parts = (weight, adapter.lora_A, adapter.lora_B, adapter.magnitude)
        tracked = bounds.merged(*(bounds.exact(np.asarray(part)) for part in parts), scaling=scaling)
        if case.base == "bfloat16":
            tracked = bounds.cast(tracked, bounds.BFLOAT16_COMPUTE.compute_unit)
        key = (0, "merged", f"layers.{position}.weight")
        predictions[key] = Prediction(value=value, limit=bounds.limit(tracked))
    return predictions


def predict_files(case: Case) -> Predictions:
    """The adapter of each layer, to the bit, and the scaling that the configuration stands for (D1)."""
    inputs = stack_inputs(case)
    scaling = dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
    predictions: Predictions = {}
    for position in range(len(case.layers)):
        name = f"layers.{position}"
        predictions[0, "scaling", name] = Prediction(value=np.asarray(jnp.float32(scaling)))
        for factor in FACTORS:
            predictions[0, "parameter", f"{name}.{factor}"] = Prediction(value=inputs[f"{name}.{factor}"])
    return predictions
