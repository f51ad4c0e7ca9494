"""Float64 autograd with the norm detached (D2 to D8), and inputs that float32 handles exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_impl import DenseBase, DoraConfig, DoraLinear


@dataclass
class Inputs:
    """One layer's numbers."""

    W: Tensor
    A: Tensor
    B: Tensor
    m: Tensor
    x: Tensor
    G: Tensor
    scaling: float
    b: Tensor | None = None


def autograd(inputs: Inputs) -> dict[str, Tensor]:
    """Give y and the gradients, in float64, as the clauses define them."""
    W, G = inputs.W.double(), inputs.G.double()
    A, B, m, x = (t.double().requires_grad_() for t in (inputs.A, inputs.B, inputs.m, inputs.x))
    V = W + inputs.scaling * (B @ A)
    n = torch.linalg.vector_norm(V, dim=1).detach()
    c = torch.where(n > 0, m / torch.where(n > 0, n, 1), 0)
    y = (x @ V.T) * c
    if inputs.b is not None:
        y = y + inputs.b.double()
    y.backward(G)
    return {"y": y.detach(), "A": A.grad, "B": B.grad, "m": m.grad, "x": x.grad}


def layer_of(inputs: Inputs, **config: object) -> DoraLinear:
    """A dense layer holding these numbers."""
    rank = inputs.A.shape[0]
    made = DoraConfig(rank=rank, alpha=inputs.scaling * rank, **config)
    return fill(DoraLinear(DenseBase(inputs.W), inputs.b, made), inputs)


def fill(layer: nn.Module, inputs: Inputs) -> nn.Module:
    """Give a layer of any kind these factors and magnitudes."""
    with torch.no_grad():
        layer.lora_A.copy_(inputs.A)
        layer.lora_B.copy_(inputs.B)
        if layer.magnitude is not None:
            layer.magnitude.copy_(inputs.m)
    return layer


def run(layer: nn.Module, x: Tensor, G: Tensor, *, keep: Tensor | None = None) -> dict[str, Tensor]:
    """Give y and the gradients of a layer, as they come; those that there are."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = layer(x) if keep is None else layer(x, keep)
    y.backward(G)
    leaves = {"A": layer.lora_A, "B": layer.lora_B, "m": layer.magnitude, "x": x}
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    return {"y": y.detach(), **grads}


def lattice(out: int, fan_in: int, rank: int, *, bias: bool, seed: int = 0) -> Inputs:
    """V has 16 entries of +-1 a row, so that every norm is 4; all else is small integers, s = 2 and dyadic m."""
    g = torch.Generator().manual_seed(seed)

    def integers(*shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=g).float()

    V = torch.zeros(out, fan_in)
    for row in range(out):
        V[row, torch.randperm(fan_in, generator=g)[:16]] = integers(16, low=0, high=2) * 2 - 1
    A, B = integers(rank, fan_in, low=-1, high=2), integers(out, rank, low=-1, high=2)
    m = torch.exp2(integers(out, low=0, high=3))
    b = integers(out) if bias else None
    return Inputs(V - 2.0 * (B @ A), A, B, m, integers(9, fan_in), integers(9, out), scaling=2.0, b=b)


def gaussian(out: int, fan_in: int, rank: int, *, scaling: float = 1.5, seed: int = 0) -> Inputs:
    """A layer at an initialiser's scale, with B some tenth of W's size."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, fan_in, generator=g) / fan_in**0.5
    A, B = torch.randn(rank, fan_in, generator=g) / fan_in**0.5, torch.randn(out, rank, generator=g) * 0.05
    x, G = torch.randn(9, fan_in, generator=g), torch.randn(9, out, generator=g)
    return Inputs(W, A, B, torch.rand(out, generator=g) + 0.5, x, G, scaling=scaling, b=torch.randn(out, generator=g))
