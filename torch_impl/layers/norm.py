"""The row norms of V = W + s B A, without forming V: the factored form, its guard, and the float64 rows.

Axes: O output features, I input features, R adapter rank.
Clauses: D3 (one norm for each row), D4 (no spurious underflow or overflow), D7 (ratio), D13 (factored form and guard),
S10 (rows whose numbers lie on several ranks).

The factored form, in float32::

    n_i^2 = |W_i|^2 + s <2 (W A')_i + s (B A A')_i, B_i>

By Cauchy and Schwarz its absolute terms sum to at most ``S_i = (|W_i| + t_i)^2``, ``t_i = |s| sum_k |B_ik| |A_k|``:
whatever order the float32 kernels take, n_i^2 is off by at most g S_i, g being the relative error of a float32 sum of
squares of that length. A row keeps the fast result only where all three of these hold, and any other row is formed in
float64 (`_direct_rows`):

- `CONDITION`: ``S_i <= 4 n_i^2``. A root halves relative errors, so n_i is off by at most 2 g: two bits more than the
  plain norm of a row. It holds where t_i <= |W_i| / 3, since n_i >= |W_i| - t_i >= (|W_i| + t_i) / 2 there: an adapter
  that moves a row by less than a third of its norm costs no float64.
- `CEILING`: ``S_i < 2^120``. No partial sum exceeds S_i by more than its rounding, so nothing overflowed (2^128).
- the floor: a product below 2^-126 may be flushed to zero. All of them together lose at most
  ``2^-126 (I + 2 R) (1 + |s| + b_i)^2`` with ``b_i = |s| sum_k |B_ik|``; n_i^2 must be 2^24 times that, so that the
  loss is below half an ulp.

So the fast form's range is norms from some 1e-13 (for |s| and b_i near 1 and I in the thousands) to 1e18. Where float32
products may be rounded to TF32 or bfloat16, g is not that of float32, and every row is formed in float64.

Where tensor ranks have parts of each row, all of the factored form's terms are sums over them, and so are the squares
of the float64 rows: these are summed first, and every rank then decides alike and has the same n.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.layers.cut import Cut
from torch_impl.layers.products import product

CONDITION = 4.0
CEILING = 2.0**120
FLUSHED = 2.0**-126 * 2.0**24
_CPU_BLOCK = 2**17  # elements of W cast or squared at a time: temporaries that stay in a core's cache
_DEVICE_BLOCK = 2**25


def _row_blocks(W_OI: Tensor) -> Iterator[slice]:
    """Consecutive row ranges of a bounded number of elements, so that no temporary is as large as W."""
    budget = _CPU_BLOCK if W_OI.device.type == "cpu" else _DEVICE_BLOCK
    step = max(1, budget // max(1, W_OI.shape[1]))
    for start in range(0, W_OI.shape[0], step):
        yield slice(start, min(start + step, W_OI.shape[0]))


def _stored_by_columns(W_OI: Tensor) -> bool:
    """Whether W is a view of an (I, O) tensor, as Conv1D's and embeddings' are: a few rows of it are strewn over it."""
    return W_OI.stride(0) < W_OI.stride(1)


def _weight_terms(W_OI: Tensor, A_RI: Tensor, *, moved: bool) -> tuple[Tensor, Tensor]:
    """D13's two terms that read W, in float32: |W_i|^2 (O) and A W' (R, O), the latter only where B isn't 0."""
    squares_O = W_OI.new_zeros(W_OI.shape[0], dtype=torch.float32)
    cross_RO = W_OI.new_zeros(A_RI.shape[0], W_OI.shape[0], dtype=torch.float32)
    by_blocks = moved and W_OI.dtype != torch.float32  # else nothing has to be cast, and one product is faster
    if moved and not by_blocks:
        cross_RO = product(A_RI, W_OI)
    if _stored_by_columns(W_OI):
        for columns in _row_blocks(W_OI.T):
            block_IO = W_OI.T[columns].float()
            squares_O += block_IO.square().sum(dim=0)
            if by_blocks:
                cross_RO.addmm_(A_RI[:, columns], block_IO)
        return squares_O, cross_RO
    for rows in _row_blocks(W_OI):
        block = W_OI[rows].float()
        squares_O[rows] = block.square().sum(dim=1)
        if by_blocks:
            cross_RO[:, rows] = product(A_RI, block)
    return squares_O, cross_RO


def _factored(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, *, scaling: float, cut: Cut | None) -> tuple[Tensor, Tensor]:
    """D13: n^2 (O) in float32, and where it may be trusted (O, bool)."""
    moved = cut is not None or bool(B_OR.any()) or not bool(torch.isfinite(A_RI).all())
    squares_O, cross_RO = _weight_terms(W_OI, A_RI, moved=moved)
    numbers = A_RI.shape[1] * (1 if cut is None else cut.ranks) + 2 * A_RI.shape[0]
    if not moved:  # a fresh adapter, B = 0: the other terms are 0
        least = FLUSHED * numbers * (1 + abs(scaling)) ** 2
        return squares_O, (squares_O < CEILING) & (squares_O >= least)
    gram_RR, length_R = A_RI @ A_RI.T, torch.linalg.vector_norm(A_RI, dim=1)
    if cut is not None:
        terms = (squares_O, cross_RO, gram_RR, length_R.square())
        squares_O, cross_RO, gram_RR, square_R = cut.sums(*terms, alike=B_OR)
        length_R = square_R.sqrt()
    inner_OR = 2 * cross_RO.T + scaling * (B_OR @ gram_RR)
    squared_O = squares_O + scaling * (inner_OR * B_OR).sum(dim=1)
    terms_O = (squares_O.sqrt() + abs(scaling) * (B_OR.abs() @ length_R)).square()
    reach_O = 1 + abs(scaling) + abs(scaling) * B_OR.abs().sum(dim=1)
    floor_O = FLUSHED * numbers * reach_O.square()
    # a comparison with NaN is false, so that poisoned intermediate terms go to the float64 rows as well
    trusted_O = (
        (CONDITION * squared_O >= terms_O) & (torch.maximum(terms_O, squared_O) < CEILING) & (squared_O >= floor_O)
    )
    return squared_O, trusted_O


def _direct_rows(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, *, scaling: float, cut: Cut | None) -> Tensor:
    """D3 in float64, rows of V formed a block at a time; 0 only where every V_ij is 0 (D4).

    Products of float32 factors lie between 2^-298 and 2^256; with s in [2^-200, 2^200] their squares stay in range.
    """
    A64_RI = A_RI.double()
    norms_O = W_OI.new_empty(W_OI.shape[0], dtype=torch.float64)
    for rows in _row_blocks(W_OI):
        V = W_OI[rows].double() + scaling * (B_OR[rows].double() @ A64_RI)
        norms_O[rows] = torch.linalg.vector_norm(V, dim=1)
    if cut is not None:
        (squares_O,) = cut.sums(norms_O.square())
        norms_O = squares_O.sqrt()
    return _rounded(norms_O)


def weight_norm(
    W_OI: Float[Tensor, "O I"],
    A_RI: Float[Tensor, "R I"],
    B_OR: Float[Tensor, "O R"],
    *,
    scaling: float,
    cut: Cut | None = None,
) -> Float[Tensor, " O"]:
    """D3 by D13: the 2-norm of every row of W + s B A, in float32, with no temporary of W's size.

    Args:
        W_OI: the weight the forward multiplies by, any floating dtype.
        A_RI: `lora_A`, float32.
        B_OR: `lora_B`, float32.
        scaling: s of D1.
        cut: S10, where other ranks have the rest of each row; all of them call together.

    Returns:
        n, float32 (O): within a few ulps of the float64 norm on every row whose norm float32 can hold, and 0 exactly
        where the row of V is 0.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dora_parity.weight_norm(W_OI, A_RI, B_OR, scaling)
    if _products_are_narrowed(W_OI.device):
        return _direct_rows(W_OI, A_RI, B_OR, scaling=scaling, cut=cut)
    squared_O, trusted_O = _factored(W_OI, A_RI, B_OR, scaling=scaling, cut=cut)
    norm_O = squared_O.sqrt()
    rows = (~trusted_O).nonzero().squeeze(1)
    if rows.numel():
        norm_O[rows] = _direct_rows(W_OI[rows], A_RI, B_OR[rows], scaling=scaling, cut=cut)
    return norm_O


@torch.library.custom_op("dora_parity::weight_norm", mutates_args=())
def _opaque_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """`weight_norm` as one operator of a compiled graph: which rows it takes to float64 depends on their values."""
    return weight_norm(W_OI, A_RI, B_OR, scaling=scaling)


@_opaque_norm.register_fake
def _norm_of_shapes(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    del A_RI, B_OR, scaling
    return W_OI.new_empty(W_OI.shape[0], dtype=torch.float32)


def _products_are_narrowed(device: torch.device) -> bool:
    """Whether `torch.set_float32_matmul_precision` or its kin allow products of float32 to be less than that."""
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    return matmul.fp32_precision not in {"none", "ieee"}


def grouped_weight_norm(
    W_GOK: Float[Tensor, "G P K"], A_GRK: Float[Tensor, "G R K"], B_GOR: Float[Tensor, "G P R"], *, scaling: float
) -> Float[Tensor, " O"]:
    """D3 for a convolution in groups, each row with its own group's A; in float64, since rows are short there.

    Args:
        W_GOK: the weight the forward multiplies by, any floating dtype; O / G rows in each group.
        A_GRK: `lora_A`, float32.
        B_GOR: `lora_B`, float32.
        scaling: s of D1.

    Returns:
        n, float32 (O), 0 exactly where the row of V is 0.
    """
    V_GOK = torch.baddbmm(W_GOK.double(), B_GOR.double(), A_GRK.double(), alpha=scaling)
    return _rounded(torch.linalg.vector_norm(V_GOK, dim=2).flatten())


def _rounded(exact_O: Tensor) -> Tensor:
    """D4: float64 norms in float32, where none but 0 becomes 0."""
    tiniest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    return torch.where(exact_O > 0, exact_O.clamp(min=tiniest), exact_O).float()


def ratio(m_O: Float[Tensor, " O"], n_O: Float[Tensor, " O"]) -> Float[Tensor, " O"]:
    """D7: c = m / n, and 0 where n is 0; float32 in, float32 out."""
    return torch.where(n_O > 0, m_O / n_O, torch.zeros_like(n_O))
