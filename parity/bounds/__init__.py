"""The derived tolerances: what rounding may do to each element of a DoRA layer's gradients, momenta and parameters.

The derivation is docs/tolerances.md. The bounds assume that roundings are independent. Their domain is inputs of
ordinary numbers, whose tokens may repeat (repeats are bounded by their own covariance); tokens that are correlated
without repeating raise `InputsNotIndependent`.
"""

from parity.bounds.layers import BFLOAT16_COMPUTE, FLOAT32, FLOAT64, Precision, merged
from parity.bounds.norm import weight_norm
from parity.bounds.repeats import InputsNotIndependent, closeness, require_independent
from parity.bounds.stack import LayerInputs, propagate
from parity.bounds.steps import Rule
from parity.bounds.tracked import GATE, Tracked, cast, difference, exact, limit, summed

__all__ = [
    "BFLOAT16_COMPUTE",
    "FLOAT32",
    "FLOAT64",
    "GATE",
    "InputsNotIndependent",
    "LayerInputs",
    "Precision",
    "Rule",
    "Tracked",
    "cast",
    "closeness",
    "difference",
    "exact",
    "limit",
    "merged",
    "propagate",
    "require_independent",
    "summed",
    "weight_norm",
]
