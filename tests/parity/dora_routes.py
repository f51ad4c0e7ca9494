"""DoRA layers computed in torch by several routes, and with bugs planted: what the bounds are tried on.

Written without `torch_impl`, so that a bound can't lean on the implementation that it is to judge.
"""

import numpy as np
import torch

from parity.bounds import LayerInputs

TENSORS = ("lora_A", "lora_B", "magnitude")


def rounded(array, dtype=torch.float32):
    """The numbers as `dtype` holds them, in float64."""
    return torch.tensor(array).to(dtype).double().numpy()


def gaussian(seed, *, shapes=((50, 33), (33, 40)), tokens=24, rank=4, base=torch.float32, data=torch.float32):
    """`(layers, x, G)` with s = 2 in mind: W rows of norm near 1, magnitudes some ten per cent off the norm."""
    generator = np.random.default_rng(seed)
    layers = []
    for fan_in, fan_out in shapes:
        weight = rounded(generator.standard_normal((fan_out, fan_in)) / np.sqrt(fan_in), base)
        A = rounded(generator.standard_normal((rank, fan_in)) / np.sqrt(fan_in), torch.float32)
        B = rounded(0.5 * generator.standard_normal((fan_out, rank)), torch.float32)
        norm = np.linalg.norm(weight + 2 * B @ A, axis=1)
        magnitude = rounded(norm * (1 + 0.1 * generator.standard_normal(fan_out)))
        layers.append(LayerInputs(weight, A, B, magnitude, rounded(generator.standard_normal(fan_out), base)))
    x = rounded(generator.standard_normal((tokens, shapes[0][0])), data)
    return layers, x, rounded(generator.standard_normal((tokens, shapes[-1][1])), data)


def direct(W, A, B, s):
    """The norm of V, formed."""
    return (W + s * (B @ A)).norm(dim=1)


def factored(W, A, B, s):
    """D13, where it does not cancel."""
    terms = (W * W).sum(1), 2 * s * ((W @ A.T) * B).sum(1), s * s * ((B @ (A @ A.T)) * B).sum(1)
    square, size = sum(terms), sum(term.abs() for term in terms)
    return torch.where(square <= 2**-10 * size, direct(W, A, B, s), square.clamp_min(0).sqrt())


def output(x, parameters, s, *, norm, form, compute):
    """One layer's y in the compute dtype, norm held constant unless the norm's name says otherwise."""
    W, A, B, m, b = parameters
    wide = m.dtype
    n = norm(W.to(wide), A, B, s)
    c = torch.where(n == 0, 0, m / torch.where(n == 0, 1, n))
    x, W, A, B = (t.to(compute) for t in (x, W, A, B))
    if form == "product":
        y0 = x @ W.T + s * ((x @ A.T) @ B.T)
    elif form == "formed":
        y0 = x @ (W + s * (B @ A)).T
    else:
        return ((x @ W.T) + ((c - 1).to(compute) * (x @ W.T) + c.to(compute) * s * ((x @ A.T) @ B.T)) + b).to(compute)
    return (c * y0.to(wide) + b).to(compute)


def detached(norm):
    """D5."""
    return lambda *arguments: norm(*arguments).detach()


ROUTES = {
    "direct-product": {"norm": detached(direct), "form": "product"},
    "factored-product": {"norm": detached(factored), "form": "product"},
    "direct-formed": {"norm": detached(direct), "form": "formed"},
}


def half_of_one_rank(gradients, rank):
    """OneRankHalved."""
    return [g * 0.5 if rank == 0 else g for g in gradients]


def train(
    layers, x, G, *, s=2.0, route="direct-product", steps=2, world=1, relu=False, lr=2.0**-6, momentum=0.5, **options
):
    """`[{(name, kind): float64 array}]` a step, computed in `dtype` (float32) with products in `compute`."""
    dtype, compute = options.get("dtype", torch.float32), options.get("compute", options.get("dtype", torch.float32))
    how = ROUTES[route] | {"compute": compute} | options.get("how", {})
    spoil = options.get("spoil", lambda gradients, _: gradients)
    held = [[torch.tensor(t, dtype=dtype) for t in (v.weight, v.lora_A, v.lora_B, v.magnitude, v.bias)] for v in layers]
    state, history = None, []
    for _ in range(steps):
        parts = [
            spoil(_rank(held, (x_k, world * G_k), s=s, relu=relu, how=how), rank)
            for rank, (x_k, G_k) in enumerate(zip(np.array_split(x, world), np.array_split(G, world), strict=True))
        ]
        gradients = [sum(column) / world for column in zip(*parts, strict=True)]
        state = gradients if state is None else [momentum * b + g for b, g in zip(state, gradients, strict=True)]
        for k, layer in enumerate(held):
            layer[1:4] = [p - lr * b for p, b in zip(layer[1:4], state[3 * k : 3 * k + 3], strict=True)]
        parameters = [tensor for layer in held for tensor in layer[1:4]]
        kinds = {"gradient": gradients, "parameter": parameters, "optimizer:momentum_buffer": state}
        history.append({key: value for kind, tensors in kinds.items() for key, value in _named(tensors, kind)})
    return history


def _rank(held, data, *, s, relu, how):
    """One rank's gradients, of A, B and magnitude of layer 0, then of layer 1, ..."""
    dtype = held[0][3].dtype
    trained = [[layer[0], *(t.detach().requires_grad_() for t in layer[1:4]), layer[4]] for layer in held]
    y = torch.tensor(data[0], dtype=dtype).to(how["compute"])
    for k, layer in enumerate(trained):
        y = output(torch.relu(y) if relu and k else y, layer, s, **how)
    return torch.autograd.grad(y, [t for layer in trained for t in layer[1:4]], torch.tensor(data[1]).to(y.dtype))


def _named(tensors, kind):
    for position, tensor in enumerate(tensors):
        yield (f"layers.{position // 3}.{TENSORS[position % 3]}", kind), tensor.detach().double().numpy()
