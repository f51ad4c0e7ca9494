"""G without a ratio: LoRA's own product against float64 autograd, to the bit on lattices."""

import pytest
import torch
from reference import lattice, layer_of, run


@pytest.mark.parametrize("tensor", ["y", "A", "B", "x"])
def test_g_lora_gradients_equal_float64_autograd_to_the_bit(tensor: str) -> None:
    """On exactly representable inputs with two leading axes the layer and y = x W' + s (x A') B' + b differ."""
    inputs = lattice(65, 66, 3, bias=True)
    x_3TI, G_3TO = inputs.x.reshape(3, 3, 66), inputs.G.reshape(3, 3, 65)
    A, B, x = (t.double().requires_grad_() for t in (inputs.A, inputs.B, x_3TI))
    y = x @ inputs.W.double().T + inputs.scaling * (x @ A.T) @ B.T + inputs.b.double()
    y.backward(G_3TO.double())

    got = run(layer_of(inputs, method="lora"), x_3TI, G_3TO)[tensor]

    assert torch.equal(got.double(), {"y": y, "A": A.grad, "B": B.grad, "x": x.grad}[tensor])
