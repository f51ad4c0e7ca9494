"""The oracle of a stack: the reference's autodiff in float64, its steps, and the bound of every tensor.

Axis legend: W_OI (out, in), x_TI (tokens, in), G_TO (tokens, out).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from parity import bounds
from parity.case import StackCase, StartCase, TrainCase
from parity.inputs import forward_tokens, stack_inputs
from parity.oracle.prediction import Key, Prediction, Predictions
from parity.oracle.weights import stored_weight, weight_used
from ref import dora, experts, training
from ref.types import Adapter, NormGradient

FACTORS = ("lora_A", "lora_B", "magnitude")
_PRECISIONS = {"float32": bounds.FLOAT32, "bfloat16": bounds.BFLOAT16_COMPUTE, "float64": bounds.FLOAT64}


def predict_stack(case: TrainCase) -> Predictions:
    """Every gradient, parameter and momentum of every step; in bounded cases with limits and the nearest bugs."""
    right, frozen = _train(case), _frozen(case)
    if case.is_exact:
        return frozen | {key: Prediction(value=value) for key, value in right.items()}
    tracked = _bounds(case)
    nearest = {} if case.method == "lora" else {"NormNotDetached": _train(case, norm_gradient="full")}
    return frozen | {
        key: _prediction(value, tracked[_tracked_key(key)], {name: tensors[key] for name, tensors in nearest.items()})
        for key, value in right.items()
    }


def _tracked_key(key: Key) -> Key:
    """By what name the bounds have it."""
    step, kind, name = key
    return (step, "gradient", name) if kind == "input_gradient" else key


def _frozen(case: TrainCase) -> Predictions:
    """S6: the bits of each frozen weight, dense or packed, before the first step and after the last."""
    inputs = stack_inputs(case)
    return {
        (step, "parameter", f"layers.{position}.base.weight"): Prediction(
            value=stored_weight(case, inputs[f"layers.{position}.weight"], transposed=case.experts == "in-out")
        )
        for position in range(len(case.layers))
        for step in {0, case.steps}
    }


def predict_start(case: StartCase) -> Predictions:
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


def stack_arrays(case: StackCase) -> tuple[tuple[Array, ...], tuple[Array | None, ...], tuple[Adapter, ...]]:
    """Float64 weights (as the forward uses them), biases, and adapters of a case's stack."""
    inputs = stack_inputs(case)
    names = [f"layers.{position}" for position in range(len(case.layers))]
    weights = tuple(weight_used(case, inputs[f"{name}.weight"]) for name in names)
    biases = tuple(_float64(inputs.get(f"{name}.bias")) for name in names)
    trained = FACTORS[:2] if isinstance(case, TrainCase) and case.method == "lora" else FACTORS
    adapters = tuple(
        Adapter(**dict.fromkeys(FACTORS) | {factor: _float64(inputs[f"{name}.{factor}"]) for factor in trained})
        for name in names
    )
    return weights, biases, adapters


def dropout_mask(keep: np.ndarray | None, *, rate: float = 0.5) -> Array | None:
    """D9: what dropout multiplies by, 1 / (1 - p) where a number is kept; None without dropout."""
    return None if keep is None else jnp.asarray(keep, dtype=jnp.float64) / (1.0 - rate)


def _float64(array: np.ndarray | None) -> Array | None:
    return None if array is None else jnp.asarray(array, dtype=jnp.float64)


Gradients = tuple[tuple[Adapter, ...], Array, Array, tuple[Array, ...]]
"""The adapters' gradients, dx (tokens, in), y (tokens, out), and each layer's norm (out,)."""


@functools.partial(jax.jit, static_argnames=("scaling", "activation", "norm_gradient", "method", "visited"))
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
    method: str = "dora",
    visited: int | None = None,
) -> Gradients:
    """The derivative of `sum(G * y)` with respect to every adapter and to x, the output, and the norms.

    With `visited`, the layers are one stack of experts, of which all tokens visit so many in turn (D16).
    """

    def loss(adapters: tuple[Adapter, ...], x: Array) -> tuple[Array, Array]:
        y = x
        for position, adapter in enumerate(adapters[:visited]):
            y = jax.nn.relu(y) if position and activation == "relu" else y
            mask = masks[position] if masks else None
            layer = {"scaling": scaling, "bias_O": biases[position], "mask_TI": mask}
            if visited is not None:
                y = _by_expert(y, position, weights, adapters, scaling=scaling, mask_SI=mask)
            elif method == "lora":
                y = _plain_lora(y, weights[position], adapter, **layer)
            else:
                y = dora.forward(y, weights[position], adapter, norm_gradient=norm_gradient, **layer)
        return jnp.sum(G_TO * y), y

    (in_adapters, in_x), y_TO = jax.grad(loss, argnums=(0, 1), has_aux=True)(adapters, x_TI)
    norms = tuple(
        dora.weight_norm(dora.direction(weight, adapter.lora_A, adapter.lora_B, scaling=scaling))
        for weight, adapter in zip(weights, adapters, strict=True)
    )
    return in_adapters, in_x, y_TO, norms


def _by_expert(
    x_TI: Array,
    expert: int,
    weights: tuple[Array, ...],
    adapters: tuple[Adapter, ...],
    **options: Any,
) -> Array:
    """D16: all tokens by one expert of the stack."""
    stack = jax.tree.map(lambda *each: jnp.stack(each), *adapters)
    return experts.experts(x_TI, jnp.full(x_TI.shape[0], expert), jnp.stack(weights), stack, **options)


def _plain_lora(
    x: Array, weight: Array, adapter: Adapter, *, scaling: float, bias_O: Array | None, mask_TI: Array | None
) -> Array:
    """`x W' + s (u A') B' + b`: the layer without a magnitude (`method="lora"`)."""
    u = x if mask_TI is None else x * mask_TI
    y = x @ weight.T + scaling * (u @ adapter.lora_A.T) @ adapter.lora_B.T
    return y if bias_O is None else y + bias_O


def _train(case: TrainCase, *, norm_gradient: NormGradient = "constant") -> dict:
    """Steps on all tokens at once; the same batch at every step. The option plants a bug."""
    inputs = stack_inputs(case)
    weights, biases, adapters = stack_arrays(case)
    masks = tuple(
        dropout_mask(inputs.get(f"layers.{position}.keep"), rate=case.dropout) for position in range(len(case.layers))
    )
    x_TI, G_TO = _float64(inputs["x"]), _float64(inputs["G"])
    options = {
        "scaling": dora.scaling(case.alpha, case.rank, rank_stabilized=case.rank_stabilized),
        "activation": case.activation,
        "method": case.method,
        "norm_gradient": norm_gradient,
        "visited": case.visited if case.experts else None,
    }
    state, tensors = None, {}
    for step in range(1, case.steps + 1):
        gradient, dx, y, norms = gradients(adapters, weights, biases, x_TI, G_TO, masks=masks, **options)
        tensors |= _outside(step, G_TO, dx=dx, y=y) | _norms(case, step, adapters, norms)
        if case.clip:
            gradient, _ = training.clip(gradient, max_norm=case.clip)
        adapters, state, kept = _stepped(case, adapters, gradient, state)
        kinds = {"gradient": gradient, "parameter": adapters, **kept}
        tensors |= {key: value for kind, tree in kinds.items() for key, value in _named(step, kind, tree).items()}
    return tensors


def _outside(step: int, G_TO: Array, *, dx: Array, y: Array) -> dict:
    """What stands outside of the layers: y, dx, and each token's part of the loss."""
    return {
        (step, "output", "y"): np.asarray(y),
        (step, "input_gradient", "x"): np.asarray(dx),
        (step, "loss", "loss"): np.asarray(jnp.sum(G_TO * y, axis=1)),
    }


def _norms(case: TrainCase, step: int, adapters: tuple[Adapter, ...], norms: tuple[Array, ...]) -> dict:
    """D3, D7: n and c of every layer, as values."""
    if case.method == "lora" or case.experts or case.compiled:  # neither an expert's are observed, nor a graph's
        return {}
    ratios = [dora.ratio(adapter.magnitude, norm) for adapter, norm in zip(adapters, norms, strict=True)]
    kinds = {"norm": norms, "ratio": ratios}
    return {
        (step, kind, f"layers.{position}"): np.asarray(array)
        for kind, arrays in kinds.items()
        for position, array in enumerate(arrays)
    }


def _stepped(case: TrainCase, adapters: tuple[Adapter, ...], gradient: tuple[Adapter, ...], state: Any) -> tuple:
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
        if getattr(adapter, factor) is not None
    }


def _bounds(case: TrainCase) -> dict:
    """The tracked tensors of every step."""
    inputs = stack_inputs(case)
    weights, biases, adapters = stack_arrays(case)
    layers = [
        bounds.LayerInputs(
            weight=np.asarray(weight),
            bias=None if bias is None else np.asarray(bias),
            **{factor: _numpy(getattr(adapter, factor)) for factor in FACTORS},
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
        masks=_masks(case),
        tokens=[_counts(case, rank) for rank in range(case.world)],
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


def _numpy(array: Array | None) -> np.ndarray | None:
    return None if array is None else np.asarray(array)


def _masks(case: TrainCase) -> list[np.ndarray | None] | None:
    """D9: what multiplies each layer's input; None without dropout."""
    if not case.dropout:
        return None
    inputs = stack_inputs(case)
    keeps = (inputs[f"layers.{position}.keep"] for position in range(len(case.layers)))
    return [_numpy(dropout_mask(keep, rate=case.dropout)) for keep in keeps]


def _counts(case: TrainCase, rank: int) -> list[int]:
    """The tokens of each forward of a rank's step (T1)."""
    return [part.stop - part.start for part in forward_tokens(case, rank, 0)]


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
