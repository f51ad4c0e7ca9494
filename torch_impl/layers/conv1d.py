"""DoRA on transformers' Conv1D, GPT-2's linear layer, whose weight is stored (I, O)."""

import sys
from typing import Any

import torch
from torch import nn

from torch_impl.layers.dora import DoraLinear
from torch_impl.layers.rows import Rows


class DoraConv1D(DoraLinear):
    """The linear layer in its place; its base is a `TransposedBase`, or packed as (O, I), as transformers does."""

    kind = "conv1d"
    transposed = True

    @staticmethod
    def standard() -> tuple[type, ...]:
        """Conv1D, where transformers has been imported: else no module is one."""
        loaded = sys.modules.get("transformers.pytorch_utils")
        return () if loaded is None else (loaded.Conv1D,)

    @staticmethod
    def rows_in(module: Any) -> Rows:
        """Of what transformers calls its sizes."""
        return Rows("conv1d", module.nf, (module.nx,))

    def plain(self) -> nn.Module:
        """Conv1D."""
        (conv1d,) = self.standard()
        with torch.device("meta"):
            return conv1d(self.out_features, self.in_features)
