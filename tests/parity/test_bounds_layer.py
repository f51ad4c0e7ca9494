"""The bounds of what one forward and backward give, by every order of evaluation: D8, D9, LoRA, several forwards.

The layer is computed in torch without `torch_impl`, so that a bound can't lean on the implementation it is to judge.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.bounds import BFLOAT16_COMPUTE, FLOAT32, limit, propagate

sys.path.insert(0, str(Path(__file__).parent))
from dora_routes import direct, gaussian

SCALING = 1.25
NAMES = ("lora_A", "lora_B", "magnitude")
PRECISIONS = {"float32": (FLOAT32, torch.float32), "bfloat16": (BFLOAT16_COMPUTE, torch.bfloat16)}
DEALS = {"one rank": (24,), "three ranks": (5, 8, 11), "two ranks, five forwards": ((4, 7), (1, 2, 10))}


@dataclass(frozen=True)
class Case:
    """Numbers that both sides hold."""

    layers: list
    x: np.ndarray
    G: np.ndarray
    masks: list
    """Dropout's, one a layer; none without."""


def drawn(seed, *, compute, drop=0.0, lora=False, tokens=24):
    """Two layers, Gaussian; with a mask a layer where `drop` is the probability of losing a number."""
    held = {"base": compute, "data": compute}
    layers, x, G = gaussian(seed, shapes=((50, 33), (33, 40)), tokens=tokens, **held)
    if lora:
        layers = [replace(layer, magnitude=None) for layer in layers]
    generator = np.random.default_rng(seed + 1000)
    masks = [(generator.random((tokens, fan_in)) >= drop) / (1 - drop) for fan_in in (50, 33)] if drop else []
    return Case(layers, x, G, masks)


class Closed(torch.autograd.Function):
    """y in three parts from u = mask * x, and its closed-form gradients, with `H - G` for what W sees of u."""

    @staticmethod
    def forward(ctx, *tensors):
        """X, u, W, A and B in the compute dtype, c in float32, and what dm is multiplied by: 1, or a bug."""
        x, u, W, A, B, c, spoil = tensors
        kept, h = u @ W.T, u @ A.T
        delta = SCALING * (h @ B.T)
        ctx.save_for_backward(u, W, A, B, c, kept + delta, h)
        ctx.spoil = spoil
        return (x @ W.T).float() + (c - 1) * kept.float() + c * delta.float()

    @staticmethod
    def backward(ctx, G):  # pyright: ignore[reportIncompatibleMethodOverride]
        """G in float32; x and u have a gradient each."""
        u, W, A, B, c, y0, h = ctx.saved_tensors
        dtype, H32 = u.dtype, G * c
        H = H32.to(dtype)
        hB = H @ B
        du = SCALING * (hB @ A) + (H32 - G).to(dtype) @ W
        dc = (G * y0.float()).sum(0) * ctx.spoil
        return G.to(dtype) @ W, du, None, SCALING * (hB.T @ u), SCALING * (H.T @ h), dc, None


def output(x, parameters, mask, *, form, compute, spoil):
    """One layer's y in the compute dtype, the norm and the ratio."""
    W, A, B, m, b = parameters
    n = None if m is None else direct(W, A, B, SCALING).detach()
    c = torch.ones(len(W)) if n is None else m / n
    W, A, B = (t.to(compute) for t in (W, A, B))
    u = x if mask is None else x * mask.to(compute)
    if form == "closed":
        return (Closed.apply(x, u, W, A, B, c, spoil) + b).to(compute), n, c
    base, kept, delta = x @ W.T, u @ W.T, SCALING * ((u @ A.T) @ B.T)
    if form == "peft":
        return base + b.to(compute) + ((c - 1).to(compute) * kept + c.to(compute) * delta), n, c
    if mask is None:
        return (c * (kept + delta).float() + b).to(compute), n, c
    return (base.float() + (c - 1) * kept.float() + c * delta.float() + b).to(compute), n, c


def forward(held, x, masks, *, form, compute, spoil):
    """The stack's y, and each layer's norm and ratio."""
    y, found = x, {}
    for k, layer in enumerate(held):
        mask = masks[k] if masks else None
        y, n, c = output(y, layer, mask, form=form, compute=compute, spoil=spoil)
        if n is not None:
            found |= {(f"layers.{k}", "norm"): n, (f"layers.{k}", "ratio"): c}
    return y, found


def computed(case, deal, *, form, compute, spoil=1.0):
    """Every tensor of one step, {(name, kind): float64 array}, as float32 code with these products gives it."""
    held = [
        [None if t is None else torch.tensor(t, dtype=torch.float32) for t in (v.weight, v.lora_A, v.lora_B)]
        + [None if v.magnitude is None else torch.tensor(v.magnitude, dtype=torch.float32)]
        + [torch.tensor(v.bias, dtype=torch.float32)]
        for v in case.layers
    ]
    trained = [(k, name) for k in range(len(held)) for name in NAMES if getattr(case.layers[k], name) is not None]
    leaves = [held[k][1 + NAMES.index(name)].requires_grad_() for k, name in trained]
    sums, ys, dxs, losses, start = [torch.zeros_like(t) for t in leaves], [], [], [], 0
    found = {}
    for rank in deal:
        losses.append(torch.zeros(()))
        for count in (rank,) if isinstance(rank, int) else rank:
            part = slice(start, start := start + count)
            x, G = (torch.tensor(t[part]).to(compute).requires_grad_() for t in (case.x, case.G))
            masks = [torch.tensor(mask[part], dtype=torch.float32) for mask in case.masks]
            y, found = forward(held, x, masks, form=form, compute=compute, spoil=spoil)
            dx, *gradients = torch.autograd.grad(y, [x, *leaves], len(deal) * G.detach())
            sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
            ys, dxs = [*ys, y.detach()], [*dxs, dx / len(deal)]
            losses[-1] = losses[-1] + (y.detach().float() * G.detach().float()).sum()
    found |= {("y", "output"): torch.cat(ys), ("x", "gradient"): torch.cat(dxs), ("loss", "loss"): torch.stack(losses)}
    found |= {(f"layers.{k}.{n}", "gradient"): t / len(deal) for (k, n), t in zip(trained, sums, strict=True)}
    return {key: tensor.detach().double().numpy() for key, tensor in found.items()}


def bound(case, deal, formats, *, form="wide"):
    """The same, tracked."""
    options = {"scaling": SCALING, "precision": formats, "masks": case.masks or None, "d9": form == "peft"}
    tracked = propagate(case.layers, case.x, case.G, world=len(deal), tokens=deal, **options)[0]
    return {key: tensor for key, tensor in tracked.items() if key[1] != "parameter" and "optimizer" not in key[1]}


def excess(got, tracked):
    """The largest error over its limit, by tensor."""
    return {key: float(np.max(np.abs(got[key] - b.value) / limit(b))) for key, b in tracked.items()}


KINDS = {
    "dora": {},
    "half dropped": {"drop": 0.5},
    "a quarter dropped": {"drop": 0.25},
    "a tenth dropped": {"drop": 0.1},
    "lora": {"lora": True},
    "lora, a quarter dropped": {"lora": True, "drop": 0.25},
}


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
@pytest.mark.parametrize("form", ["wide", "peft", "closed"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_honest_layer_stays_within_every_bound(precision, kind, form, deal):
    """Each tensor of a step is bounded, and no error comes to half of its limit or beyond its guard."""
    formats, compute = PRECISIONS[precision]
    case = drawn(3, compute=compute, **kind)

    got, tracked = computed(case, deal, form=form, compute=compute), bound(case, deal, formats, form=form)

    assert set(tracked) == set(got)
    assert all(np.all(np.abs(got[key] - b.value) <= b.guard) for key, b in tracked.items())
    assert max(excess(got, tracked).values()) < 0.5


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float32_bounds_see_a_ten_thousandth(kind):
    """A relative error of 1e-4 is beyond the limit in nine of ten elements of every tensor, and in its largest."""
    case = drawn(3, compute=torch.float32, **kind)

    for key, b in bound(case, DEALS["three ranks"], FLOAT32).items():
        seen = 1e-4 * np.abs(b.value) > limit(b)
        assert np.mean(seen) > 0.9 or b.value.size <= 3, key
        assert seen.flat[np.argmax(np.abs(b.value))], key


def test_names_of_lora_lack_the_magnitude():
    """Without a magnitude there is no gradient of it, no norm and no ratio."""
    tracked = bound(drawn(3, compute=torch.float32, lora=True), (24,), FLOAT32)

    assert {name.split(".")[-1] for name, _ in tracked} == {"lora_A", "lora_B", "y", "x", "loss"}


def test_ratio_of_lora_rounds_nothing():
    """LoRA is bounded more tightly than the DoRA layer whose magnitude is its norm."""
    case = drawn(3, compute=torch.float32, lora=True)
    norms = [np.linalg.norm(v.weight + SCALING * v.lora_B @ v.lora_A, axis=1) for v in case.layers]
    dora = replace(case, layers=[replace(v, magnitude=n) for v, n in zip(case.layers, norms, strict=True)])

    narrow, wide = bound(case, (24,), FLOAT32), bound(dora, (24,), FLOAT32)

    assert all(np.all(limit(b) <= limit(wide[key])) for key, b in narrow.items())
    assert np.all(limit(narrow["y", "output"]) < limit(wide["y", "output"]))


def test_y_of_a_mask_of_ones_is_that_of_no_mask():
    """A mask that keeps everything at full strength gives the same numbers."""
    case = drawn(3, compute=torch.float32)
    ones = replace(case, masks=[np.ones((24, 50)), np.ones((24, 33))])

    plain, masked = bound(case, (24,), FLOAT32), bound(ones, (24,), FLOAT32)

    assert all(np.allclose(masked[key].value, b.value, rtol=1e-12, atol=1e-12) for key, b in plain.items())


FAULTS = {
    "dm ten thousandth": ("closed", {"spoil": 1.0001}, ("layers.1.magnitude", "gradient")),
    "mask on the base as well": ("wide", {"base": True}, ("y", "output")),
    "mask without its scale": ("wide", {"unscaled": True}, ("layers.0.lora_A", "gradient")),
    "mask of another layer's draw": ("wide", {"other": True}, ("layers.1.lora_B", "gradient")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_dropout_fault_exceeds_the_bound(fault):
    """D9: each of these bugs is beyond the limit of the tensor that it touches."""
    form, how, key = fault
    case = drawn(5, compute=torch.float32, drop=0.25)
    tracked, wrong = bound(case, (24,), FLOAT32)[key], case
    if how.get("base"):
        wrong = replace(case, x=case.x * (case.masks[0] != 0))
    if how.get("unscaled"):
        wrong = replace(case, masks=[(mask != 0).astype(float) for mask in case.masks])
    if how.get("other"):
        wrong = replace(case, masks=[case.masks[0], np.roll(case.masks[1], 1, axis=0)])

    got = computed(wrong, (24,), form=form, compute=torch.float32, spoil=how.get("spoil", 1.0))[key]

    assert np.any(np.abs(got - tracked.value) > limit(tracked))


@pytest.mark.parametrize("key", [("layers.0", "norm"), ("layers.1", "ratio"), ("y", "output"), ("x", "gradient")])
def test_outside_tensors_show_a_scaling_off_by_a_thousandth(key):
    """n, c, y and dx are bounded tightly enough to show s times 1.001."""
    case = drawn(5, compute=torch.float32)
    options = {"precision": FLOAT32, "world": 1}
    right, wrong = (propagate(case.layers, case.x, case.G, scaling=s, **options)[0][key] for s in (1.25, 1.25125))

    assert np.mean(np.abs(wrong.value - right.value) > limit(right)) > 0.9


def test_forwards_of_a_rank_are_counted():
    """T1: a step made of several forwards has the same gradient, and at least the roundings of its sums."""
    case = drawn(3, compute=torch.float32)

    one, several = (bound(case, deal, FLOAT32)["layers.0.lora_A", "gradient"] for deal in ((24,), ((8, 8, 8),)))

    assert np.allclose(one.value, several.value, rtol=1e-12, atol=1e-12)
    assert np.all(np.abs(several.value) < 1e7 * limit(several))


def test_a_forward_left_out_exceeds_the_bound():
    """T1: gradients of two of a rank's three forwards are not those of all."""
    case = drawn(3, compute=torch.float32)
    fewer = replace(case, x=case.x[:16], G=case.G[:16])
    key = ("layers.0.lora_B", "gradient")

    tracked = bound(case, ((8, 8, 8),), FLOAT32)[key]
    got = computed(fewer, ((8, 8),), form="wide", compute=torch.float32)[key]

    assert np.mean(np.abs(got - tracked.value) > limit(tracked)) > 0.9


def test_masks_for_some_layers_are_refused():
    """One mask a layer, or a ValueError that says so."""
    case = drawn(3, compute=torch.float32, drop=0.5)

    with pytest.raises(ValueError, match="1 masks for 2 layers"):
        propagate(case.layers, case.x, case.G, scaling=SCALING, masks=case.masks[:1])
