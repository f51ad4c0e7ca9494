"""DoRA on nn.Embedding: a linear layer of one-hot rows, computed by looking up.

Axes: V tokens of the vocabulary, O features (one magnitude each), R adapter rank, T places.
Clauses: D3, D7, D12, G1.

    y_T = c * (W'[id_T] + s A'[id_T] B'),     W (O, V) in rows, stored (V, O); A (R, V), B (O, R), m (O)

The column of A that belongs to `padding_idx` gets no gradient; B and m get theirs from every place. Dropout (D9) acts
on numbers that a layer reads, and an embedding reads none: as in PEFT it is not dropped out. Under FSDP the base is cut
along V, the axis that the norm runs over; it is whole in its own forward, where all is computed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from torch_impl.config import DoraConfig
from torch_impl.layers.bases import TransposedBase
from torch_impl.layers.dora import DoraLayer
from torch_impl.layers.rows import Rows
from torch_impl.layers.rule import Matrix, Operation


@dataclass(frozen=True)
class Lookup(Operation):
    """An embedding's operation: column id of the rows, for each id."""

    padding_idx: int | None
    """The id whose column gets no gradient."""
    feature_axis: int = -1

    def plain(self, x: Int[Tensor, "*T"], rows: Float[Tensor, "O V"]) -> Float[Tensor, "*T O"]:
        """Ids (...) to (..., O)."""
        return functional.embedding(x, rows.T)

    def input_gradient(self, G: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        """Ids have none.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"ids have no gradient: {G.shape}, {rows.shape}, {shape}")

    def rows_gradient(self, G: Float[Tensor, "*T O"], x: Int[Tensor, "*T"], shape: torch.Size) -> Float[Tensor, "O V"]:
        """Each place's gradient, added to its id's column: torch's own kernel, whose order is fixed on any device."""
        padding = -1 if self.padding_idx is None else self.padding_idx
        found_VO = torch.ops.aten.embedding_dense_backward(G, x, shape[1], padding, scale_grad_by_freq=False)
        return found_VO.T.contiguous()


class DoraEmbedding(DoraLayer):
    """An embedding whose A, B and m train; `forward` takes ids, and y has the base weight's dtype.

    Args:
        base: the frozen weight, stored (V, O).
        config: `DoraLayer`'s.
        padding_idx: nn.Embedding's.
    """

    kind = "embedding"
    transposed = True
    peft_names = DoraLayer.peft_names | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

    def __init__(self, base: TransposedBase, config: DoraConfig, *, padding_idx: int | None) -> None:
        features, tokens = base.shape
        super().__init__(
            base, None, config, rows=Rows("embedding", features, (tokens,)), down=Lookup(padding_idx), up=Matrix()
        )
        self.num_embeddings, self.embedding_dim, self.padding_idx = tokens, features, padding_idx

    @staticmethod
    def standard() -> tuple[type[nn.Module], ...]:
        """nn.Embedding."""
        return (nn.Embedding,)

    @staticmethod
    def rows_in(module: Any) -> Rows:
        """A number for each token."""
        return Rows("embedding", module.embedding_dim, (module.num_embeddings,))

    @classmethod
    def over(cls, module: Any, base: Any, config: DoraConfig) -> "DoraEmbedding":
        """With its padding."""
        return cls(base, config, padding_idx=module.padding_idx)

    def plain(self) -> nn.Module:
        """nn.Embedding."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")

    @torch.no_grad()
    def _draw_factors(self) -> None:
        """D12: the other way round than elsewhere: A zero, B standard normal, as PEFT draws them."""
        nn.init.normal_(self.lora_B)

    def _drawn(self, x: Tensor) -> None:
        """D9: nothing is dropped."""
