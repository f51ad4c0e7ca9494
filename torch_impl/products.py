"""Matrix products, float32 ones on a CPU by oneDNN.

Axes: O output features, I input features.

torch gives a CPU's bfloat16 products to oneDNN and its float32 ones to MKL, which has no AVX-512 path for processors of
other makers: on the one measured, oneDNN takes 0.45 of MKL's time. Both sum in float32, in other orders. The product
that D12 holds to the plain layer's bits, x W', is left to torch; these are the backward pass's and the norm's.
"""

import torch
from jaxtyping import Float
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch has the operator that `torch.compile` gives linear layers to."""


def product(x: Float[Tensor, "... I"], W_OI: Float[Tensor, "O I"]) -> Float[Tensor, "... O"]:
    """Give x W', in the dtype of both.

    Args:
        x: any leading axes, any strides.
        W_OI: any strides; the transpose of a matrix costs no copy.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or W_OI.requires_grad)  # oneDNN's operator has no gradient
    on_cpu_in_float32 = x.device.type == "cpu" and x.dtype == W_OI.dtype == torch.float32
    if HAS_ONEDNN and on_cpu_in_float32 and not recorded and x.numel() and W_OI.numel():
        return torch.ops.mkldnn._linear_pointwise(x, W_OI, None, "none", [], "")  # noqa: SLF001 - it has no public name
    return x @ W_OI.T
