"""The oracle of the codec: what is stored and what is read back, every bit (Q1 to Q6)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from parity.case import DecodeCase
from parity.inputs import stack_inputs
from parity.oracle.prediction import Prediction, Predictions
from parity.oracle.weights import PROFILE
from ref import quant


def predict_codec(case: DecodeCase) -> Predictions:
    """Packed bytes, 8-bit absmax codes and the decoded weight of each layer."""
    predictions: Predictions = {}
    inputs = stack_inputs(case)
    for position in range(len(case.layers)):
        name = f"layers.{position}.weight"
        weight = jnp.asarray(inputs[name]).astype(case.compute)
        form = {"quant_type": case.base, "blocksize": case.blocksize, "nested": not case.flat}
        packed, state = quant.encode(weight, profile=PROFILE, **form)
        decoded = quant.decode(packed, state, dtype=jnp.dtype(case.compute))
        for kind, array in (("packed", packed), ("absmax", state.absmax), ("decoded", decoded)):
            predictions[0, kind, name] = Prediction(value=np.asarray(array))
    return predictions
