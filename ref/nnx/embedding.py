"""Flax's embedding with an adapter: one magnitude for each feature. D3."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ref import dora, layers
from ref.nnx.config import DoRAConfig
from ref.nnx.shared import (
    add_adapter,
    cast,
    layout_of,
    linear_adapter,
    refuse_out_sharding,
    widened,
)
from ref.types import Adapter, InputError


class DoRAEmbed(nnx.Embed):
    """D3: nnx.Embed with an adapter: one magnitude for each feature. Here lora_a is (V, R), lora_b (R, features)."""

    def __init__(self, num_embeddings: int, features: int, *, config: DoRAConfig, rngs: nnx.Rngs, **embed: Any) -> None:
        super().__init__(num_embeddings, features, rngs=rngs, **embed)
        shape, dtype = (num_embeddings, features), jnp.dtype(config.param_dtype)
        factors = layers.initial_embedding_factors(rngs.params(), shape, rank=config.rank, dtype=dtype)
        W_DV = cast(self.embedding[...], self.dtype).T
        magnitude = dora.initial_magnitude(W_DV, *factors, scaling=config.scaling)
        add_adapter(self, Adapter(*factors, magnitude), config=config, rngs=None, like=self.embedding)

    @classmethod
    def from_base(cls, base: nnx.Embed, config: DoRAConfig, *, rngs: nnx.Rngs) -> "DoRAEmbed":
        """The layer with the base's own variable in it, and a new adapter.

        Raises:
            InputError: where the configuration has dropout, which needs an input that is no identifier.
        """
        if config.dropout_rate:
            raise InputError("an embedding reads identifiers, which no dropout can drop", hint="give dropout_rate 0")
        made = cls(
            base.num_embeddings,
            base.features,
            config=config,
            dtype=base.dtype,
            param_dtype=base.param_dtype,
            embedding_init=lambda *_: base.embedding[...],
            embedding_metadata=layout_of(base.embedding),
            promote_dtype=base.promote_dtype,
            rngs=rngs,
        )
        made.embedding = base.embedding
        return made

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """D3: identifiers of any shape to features, in `dtype`; the arithmetic is in the adapter's."""
        refuse_out_sharding(out_sharding)
        W_VD = widened(cast(self.embedding[...], self.dtype), self.adapter)
        options = {"scaling": self.config.scaling, "norm_gradient": self.config.norm_gradient}
        y_TD = layers.embedding(inputs.reshape(-1), W_VD, self.adapter, **options)
        return y_TD.reshape(*inputs.shape, self.features).astype(self.dtype)

    def attend(self, query: Array, out_sharding: None = None) -> Array:
        """D3: scores by the adapted table, where it is the output head as well; gradients reach the adapter."""
        table = self(jnp.arange(self.num_embeddings), out_sharding)
        query, table = self.promote_dtype((query, table), dtype=self.dtype)
        return query @ table.T

    def merged(self) -> nnx.Embed:
        """D10: the plain table that does the same, in its own dtype."""
        merged = dora.merge(self.embedding[...].T, self.adapter, scaling=self.config.scaling).T
        return nnx.Embed(
            self.num_embeddings,
            self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=lambda *_: merged.astype(self.embedding.dtype),
            rngs=nnx.Rngs(0),
        )

    @property
    def adapter(self) -> Adapter:
        """D2: A `(R, V)`, B `(features, R)` and m in the specification's orientation."""
        return linear_adapter(self)
