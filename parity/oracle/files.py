"""The oracle of merged weights (D10), and of what files hold (C1, C2): the numbers that went into them."""

from __future__ import annotations

from itertools import product

import jax.numpy as jnp
import numpy as np

from parity import bounds
from parity.case import CheckpointCase, ExchangeCase, MergeCase
from parity.inputs import stack_inputs
from parity.inputs.llama import LEFT, LINEARS, llama_weights
from parity.oracle.prediction import Prediction, Predictions
from parity.oracle.stack import FACTORS, stack_arrays
from parity.oracle.weights import PROFILE, STORAGES
from ref import dora, quant


def predict_merged(case: MergeCase) -> Predictions:
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


def predict_checkpoint(case: CheckpointCase) -> Predictions:
    """C2: coded from the weights that went in, and never written: what either side reads, and every rank decodes."""
    weights = {name: jnp.asarray(weight).astype(case.compute) for name, weight in llama_weights(case).items()}
    predictions: Predictions = {}
    for name in LINEARS:
        packed, state = quant.encode(weights[name], quant_type=case.base, profile=PROFILE, nested=not case.flat)
        decoded = Prediction(value=np.asarray(quant.decode(packed, state)))
        ours = f"{name.removesuffix('.weight')}.base.weight"
        stored = np.asarray(packed).view(STORAGES[case.storage]).reshape(-1, 1)
        predictions[0, "packed", name] = Prediction(value=np.asarray(packed))
        predictions[0, "absmax", name] = Prediction(value=np.asarray(state.absmax))
        predictions[0, "decoded", name] = predictions[0, "decoded", ours] = decoded
        predictions[0, "parameter", ours] = Prediction(value=stored)
    for name, kind in product(LEFT, ("decoded", "parameter")):
        predictions[0, kind, name] = Prediction(value=np.asarray(weights[name]))
    return predictions


def predict_adapters(case: ExchangeCase) -> Predictions:
    """C1: the adapter of each layer, to the bit, and the scaling that the configuration stands for (D1)."""
    inputs = stack_inputs(case)
    scaling = dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
    predictions: Predictions = {}
    for position in range(len(case.layers)):
        name = f"layers.{position}"
        predictions[0, "scaling", name] = Prediction(value=np.asarray(jnp.float32(scaling)))
        for factor in FACTORS:
            predictions[0, "parameter", f"{name}.{factor}"] = Prediction(value=inputs[f"{name}.{factor}"])
    return predictions
