"""The oracle of a stack: the reference's autodiff in float64, its steps, and the bound of every tensor.

Axis legend: W_OI (out, in), x_TI (tokens, in), G_TO (tokens, out).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity import bounds
from parity.case import Case
from parity.inputs import deal_tokens, stack_inputs
from parity.oracle.prediction import Prediction, Predictions
from parity.oracle.weights import weight_used
from ref import dora, training
from ref.types import Adapter, NormGradient

FACTORS = ("lora_A", "lora_B", "magnitude")
_PRECISIONS = {"float32": bounds.FLOAT32, "bfloat16": bounds.BFLOAT16_COMPUTE, "float64": bounds.FLOAT64}


def predict_stack(case: Case) -> Predictions:
    """Every gradient, parameter and momentum of every step; in bounded cases with limits and the nearest bugs."""
    right = _train(case)
    if case.is_exact:
        return {key: Prediction(value=value) for key, value in right.items()}
    tracked = _bounds(case)
    nearest = {"NormNotDetached": _train(case, norm_gradient="full")}
    if case.compute == "bfloat16":  # the narrowest numbers hide it best (D11); in float32 any check would see it
        nearest["MagnitudeDtype"] = _train(case, magnitude_dtype="bfloat16")
    return {
        key: _prediction(value, tracked[key], {name: tensors[key] for name, tensors in nearest.items()})
        for key, value in right.items()
    }


def predict_start(case: Case) -> Predictions:
    """D6: each layer's magnitude before any step, with the bound of a float32 norm."""
    weights, _, adapters = stack_arrays(case)
    scaling = dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
    predictions: Predictions = {}
    for position, (weight, adapter) in enumerate(zip(weights, adapters, strict=True)):
        value = dora.initial_magnitude(weight, adapter.lora_A, adapter.lora_B, scaling=scaling)
        factors = (bounds.exact(np.asarray(part)) for part in (weight, adapter.lora_A, adapter.lora_B))
        tracked = bounds.weight_norm(*factors, scaling=scaling, unit=bounds.FLOAT32.unit)
        key = (0, "parameter", f"layers.{position}.magnitude")
        predictions[key] = Prediction(value=np.asarray(value), limit=bounds.limit(tracked))
    return predictions


def _prediction(value: np.ndarray, tracked: bounds.Tracked, mutants: dict[str, np.ndarray]) -> Prediction:
    return Prediction(
        value=value,
        limit=bounds.limit(tracked),
        pair_limit=bounds.limit(bounds.difference(tracked, tracked)),
        mutants=mutants,
    )


def stack_arrays(case: Case) -> tuple[tuple[Array, ...], tuple[Array | None, ...], tuple[Adapter, ...]]:
    """Float64 weights (as the forward uses them), biases, and adapters of a case's stack."""
    inputs = stack_inputs(case)
    names = [f"layers.{position}" for position in range(len(case.layers))]
    weights = tuple(weight_used(case, inputs[f"{name}.weight"]) for name in names)
    biases = tuple(_float64(inputs.get(f"{name}.bias")) for name in names)
    adapters = tuple(Adapter(*(_float64(inputs[f"{name}.{factor}"]) for factor in FACTORS)) for name in names)
    return weights, biases, adapters


def dropout_mask(keep: np.ndarray | None) -> Array | None:
    """D9: what dropout multiplies by, 2 where a number is kept; None without dropout."""
    return None if keep is None else 2.0 * jnp.asarray(keep, dtype=jnp.float64)


def _float64(array: np.ndarray | None) -> Array | None:
    return None if array is None else jnp.asarray(array, dtype=jnp.float64)


@functools.partial(jax.jit, static_argnames=("scaling", "activation", "norm_gradient"))
def gradients(
    adapters: tuple[Adapter, ...],
    weights: tuple[Array, ...],
    biases: tuple[Array | None, ...],
    x_TI: Array,
    G_TO: Array,
    *,
    masks: tuple[Array | None, ...] | None = None,
    scaling: float,
    activation: str,
    norm_gradient: NormGradient = "constant",
) -> tuple[Adapter, ...]:
    """The derivative of `sum(G * y)` with respect to every adapter."""

    def loss(adapters: tuple[Adapter, ...]) -> Array:
        y = x_TI
        for position, adapter in enumerate(adapters):
            y = jax.nn.relu(y) if position and activation == "relu" else y
            y = dora.forward(
                y,
                weights[position],
                adapter,
                scaling=scaling,
                bias_O=biases[position],
                mask_TI=masks[position] if masks else None,
                norm_gradient=norm_gradient,
            )
        return jnp.sum(G_TO * y)

    return jax.grad(loss)(adapters)


def _train(case: Case, *, norm_gradient: NormGradient = "constant", magnitude_dtype: str = "float64") -> dict:
    """Steps on all tokens at once; the same batch at every step. The two options plant a bug each."""
    inputs = stack_inputs(case)
    weights, biases, adapters = stack_arrays(case)
    masks = tuple(dropout_mask(inputs.get(f"layers.{position}.keep")) for position in range(len(case.layers)))
    x_TI, G_TO = _float64(inputs["x"]), _float64(inputs["G"])
    options = {
        "scaling": dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized),
        "activation": case.activation,
    }
    state, tensors = None, {}
    for step in range(1, case.steps + 1):
        seen = tuple(
            dataclasses.replace(a, magnitude=a.magnitude.astype(magnitude_dtype).astype(jnp.float64)) for a in adapters
        )
        gradient = gradients(seen, weights, biases, x_TI, G_TO, norm_gradient=norm_gradient, masks=masks, **options)
        if case.clip:
            gradient, _ = training.clip(gradient, max_norm=case.clip)
        adapters, state, kept = _stepped(case, adapters, gradient, state)
        kinds = {"gradient": gradient, "parameter": adapters, **kept}
        tensors |= {key: value for kind, tree in kinds.items() for key, value in _named(step, kind, tree).items()}
    return tensors


def _stepped(case: Case, adapters: tuple[Adapter, ...], gradient: tuple[Adapter, ...], state: Any) -> tuple:
    """T3: parameters after a step, the optimizer's state, and what of it has a parameter's shape, by kind."""
    lr = case.learning_rate
    if case.optimizer == "adamw":
        adapters, state = training.adamw(adapters, gradient, state, lr=lr, weight_decay=case.weight_decay)
        return adapters, state, dict(zip(case.state_kinds, (state.first, state.second), strict=True))
    adapters, state = training.sgd_momentum(adapters, gradient, state, lr=lr, momentum=case.momentum)
    return adapters, state, {case.state_kinds[0]: state}


def _named(step: int, kind: str, adapters: tuple[Adapter, ...]) -> dict:
    return {
        (step, kind, f"layers.{position}.{factor}"): np.asarray(getattr(adapter, factor))
        for position, adapter in enumerate(adapters)
        for factor in FACTORS
    }


def _bounds(case: Case) -> dict:
    """The tracked tensors of every step."""
    inputs = stack_inputs(case)
    weights, biases, adapters = stack_arrays(case)
    layers = [
        bounds.LayerInputs(
            weight=np.asarray(weight),
            bias=None if bias is None else np.asarray(bias),
            **{factor: np.asarray(getattr(adapter, factor)) for factor in FACTORS},
        )
        for weight, bias, adapter in zip(weights, biases, adapters, strict=True)
    ]
    steps = bounds.propagate(
        layers,
        inputs["x"].astype(np.float64),
        inputs["G"].astype(np.float64),
        scaling=dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized),
        activation=case.activation,
        precision=_PRECISIONS[case.compute],
        rule=bounds.Rule(
            optimizer=case.optimizer,
            lr=case.learning_rate,
            momentum=case.momentum,
            weight_decay=case.weight_decay,
            clip=case.clip,
        ),
        steps=case.steps,
        world=case.world,
        tokens=[part.stop - part.start for part in deal_tokens(case.tokens, case.world)],
        d9=case.subject == "peft",
    )
    tracked = {(at, kind, name): tensor for at, step in enumerate(steps, 1) for (name, kind), tensor in step.items()}
    if case.subject == "differences":
        terms = _loss_terms(
            layers[0], inputs, scaling=dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized)
        )
        for factor, squares in terms.items():
            key = (1, "gradient", f"layers.0.{factor}")
            tracked[key] = bounds.summed(tracked[key], squares, terms=inputs["G"].size, unit=bounds.FLOAT64.unit)
    return tracked


def _loss_terms(layer: bounds.LayerInputs, inputs: dict[str, np.ndarray], *, scaling: float) -> dict[str, np.ndarray]:
    """For differences: each derivative is one sum over all of the loss's terms; here the sum of their squares.

    d(G_to y_to) / dA_rj = G_to c_o s B_or x_tj,    / dB_or = G_to c_o s h_tr,    / dm_o = G_to y0_to / n_o
    """
    x, G_squares = inputs["x"], inputs["G"] ** 2
    V = layer.weight + scaling * layer.lora_B @ layer.lora_A
    n = np.linalg.norm(V, axis=1)
    ratio_squares = (scaling * layer.magnitude / n)[:, None] ** 2
    return {
        "lora_A": (G_squares @ (ratio_squares * layer.lora_B**2)).T @ x**2,
        "lora_B": ratio_squares * (G_squares.T @ (x @ layer.lora_A.T) ** 2),
        "magnitude": np.sum(G_squares * (x @ V.T) ** 2, axis=0) / n**2,
    }
