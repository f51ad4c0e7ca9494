"""The bounds of clipping and of optimizer steps hold what torch gives, and let no planted bug through."""

import numpy as np
import pytest
import torch

from parity.bounds import FLOAT32, Rule, exact, limit
from parity.bounds.steps import clipped, stepped

U = FLOAT32.unit
ADAMW = Rule(optimizer="adamw", lr=2.0**-4, weight_decay=2.0**-6)


def numbers(seed, size=4000):
    """Ordinary float32 numbers, in float64."""
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32).astype(np.float64)


def torch_steps(optimizer_class, steps, **options):
    """Parameter and state after torch's own steps, in float64."""
    parameter = torch.nn.Parameter(torch.tensor(numbers(0), dtype=torch.float32))
    optimizer = optimizer_class([parameter], **options)
    for step in range(1, steps + 1):
        parameter.grad = torch.tensor(numbers(step), dtype=torch.float32)
        optimizer.step()
    state = {name: tensor.double().numpy() for name, tensor in optimizer.state[parameter].items() if tensor.dim()}
    return {"parameter": parameter.detach().double().numpy(), **state}


def bounded_steps(rule, steps):
    """The same, tracked."""
    parameters, state = [exact(numbers(0))], {}
    for step in range(1, steps + 1):
        moved = stepped(parameters, [exact(numbers(step))], state, rule, count=step, unit=U)
        parameters, state = moved.parameters, moved.state
    return {"parameter": parameters[0], **{name: tensors[0] for name, tensors in state.items()}}


def excess(got, bounds):
    """The largest error over its limit, by tensor."""
    return {name: float(np.max(np.abs(got[name] - b.value) / limit(b))) for name, b in bounds.items()}


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_torchs_adamw_stays_within_the_bound(steps):
    """T3: float32 AdamW is as near to the exact one as its bound says, moments and parameter."""
    got = torch_steps(torch.optim.AdamW, steps, lr=2.0**-4, weight_decay=2.0**-6)

    found = excess(got, bounded_steps(ADAMW, steps))
    assert set(found) == {"parameter", "exp_avg", "exp_avg_sq"}
    assert max(found.values()) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"weight_decay": 0.0}, id="no decay"),
        pytest.param({"betas": (0.9, 0.998)}, id="another beta"),
        pytest.param({"eps": 1e-4}, id="another eps"),
    ],
)
def test_another_adamw_does_not(wrong):
    """T3: a wrong constant is outside the bound of the parameter."""
    got = torch_steps(torch.optim.AdamW, 2, **{"lr": 2.0**-4, "weight_decay": 2.0**-6} | wrong)

    assert excess(got, bounded_steps(ADAMW, 2))["parameter"] > 1


def clipped_by_torch(gradient, max_norm):
    """What torch's own clipping leaves."""
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient, dtype=torch.float32)
    torch.nn.utils.clip_grad_norm_([parameter], max_norm)
    return parameter.grad.double().numpy()


@pytest.mark.parametrize("size", [1.0, 2.0**-20], ids=["ordinary", "faint"])
def test_torchs_clipping_stays_within_the_bound(size):
    """T2, S5: by a norm summed in float32, in torch's own order."""
    gradient = size * numbers(1)

    (bound,) = clipped([exact(gradient)], Rule(clip=size), U)
    assert np.all(np.abs(clipped_by_torch(gradient, size) - bound.value) <= limit(bound))


def test_a_missing_addend_shows_in_a_faint_gradient():
    """S5: optax's coefficient, max_norm / N, is outside the bound where N is small."""
    gradient = 2.0**-20 * numbers(1)

    (bound,) = clipped([exact(gradient)], Rule(clip=2.0**-20), U)
    without = gradient * 2.0**-20 / np.linalg.norm(gradient)
    assert np.all(np.abs(without - bound.value) > limit(bound))


def test_a_norm_at_the_limit_is_refused():
    """T2: where rounding decides whether anything is clipped, there is no bound."""
    with pytest.raises(ValueError, match="too near"):
        clipped([exact(numbers(1))], Rule(clip=float(np.linalg.norm(numbers(1)))), U)
