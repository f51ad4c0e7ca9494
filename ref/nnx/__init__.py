"""DoRA for flax: nnx modules over the pure functions, in flax's own orientation. Clauses D1 to D12, Q4, of each module.

Axes, in flax's order: I in, O out, R rank; kernel (I, O), lora_a (I, R), lora_b (R, O), magnitude (O). A convolution
has kernel (*window, I / groups, O), lora_a (*window, I / groups, groups R), and channels last in its input.

    module              in place of          the pure functions
    DoRALinear          nnx.Linear           dora.forward
    DoRALinearGeneral   nnx.LinearGeneral    dora.forward, of flattened features
    DoRAEmbed           nnx.Embed            layers.embedding
    DoRAConv            nnx.Conv             layers.convolution
    QDoRALinear         nnx.Linear           quant.encode once, then quant_fast.decode and dora.forward

    model = apply_dora(model, DoRAConfig(rank=8, alpha=16.0), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=TRAINABLE)
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, TRAINABLE))(model, batch)
    optimizer.update(model, gradients)
    model = merge(model)

A module keeps its base's attributes and paths (`layer.kernel`), so that checkpoints of the base still fit; what is new
are `lora_a`, `lora_b` and `magnitude`, of type `DoRAParam`. Dropout follows `model.train()` and `model.eval()`. This
package alone imports flax.
"""

from ref.nnx.config import FROZEN, TRAINABLE, DoRAConfig, DoRAParam, Packed
from ref.nnx.convolution import DoRAConv
from ref.nnx.embedding import DoRAEmbed
from ref.nnx.linear import DoRALinear, DoRALinearGeneral, QDoRALinear
from ref.nnx.model import apply_dora, linear_layers, merge

__all__ = [
    "FROZEN",
    "TRAINABLE",
    "DoRAConfig",
    "DoRAConv",
    "DoRAEmbed",
    "DoRALinear",
    "DoRALinearGeneral",
    "DoRAParam",
    "Packed",
    "QDoRALinear",
    "apply_dora",
    "linear_layers",
    "merge",
]
