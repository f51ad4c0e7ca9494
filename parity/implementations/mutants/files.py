"""Bugs of adapter files and merged weights: C1, C3, C4, D10."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from parity.case import Case
from parity.implementations import torch_files
from parity.implementations.mutants.base import Mutant
from parity.job import Place
from torch_impl import DoraLinear, LocalShard, load_adapter
from torch_impl.errors import AdapterFileError
from torch_impl.files import adapter as adapter_files


class DoraSilentlyLora(Mutant):
    """Magnitudes are not read: each starts anew from the weight."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Read all, and forget them."""

        def forgetting(model: nn.Module, folder: Path, **options: object) -> nn.Module:
            model = load_adapter(model, folder, **options)
            for layer in model.modules():
                if isinstance(layer, DoraLinear):
                    layer.reset_magnitude()
            return model

        return mock.patch.object(torch_files, "load_adapter", forgetting)


class ShardSavedAsWhole(Mutant):
    """Rank 0 writes a tensor in which only its own rows are filled."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Gather nothing."""

        def own(shard: LocalShard) -> Tensor:
            whole = torch.zeros(shard.global_shape)
            (whole.view(-1) if len(shard.index) == 1 else whole)[shard.index] = shard.tensor
            return whole

        return mock.patch.object(adapter_files, "gathered", own)


class MergedWithoutMagnitude(Mutant):
    """The merged weight is W + s B A."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Make every c 1, and merge."""
        right = torch_files.merge_adapter

        def plain(model: nn.Module) -> nn.Module:
            for layer in model.modules():
                if isinstance(layer, DoraLinear):
                    layer.reset_magnitude()
            return right(model)

        return mock.patch.object(torch_files, "merge_adapter", plain)


class PickleRead(Mutant):
    """What is no safetensors file is taken for a pickle."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Load it as older files are loaded."""

        def reading(model: nn.Module, folder: Path, **options: object) -> nn.Module:
            try:
                return load_adapter(model, folder, **options)
            except AdapterFileError:
                pickle.loads((folder / torch_files.WEIGHTS).read_bytes())  # noqa: S301 - the bug
                return model

        return mock.patch.object(torch_files, "load_adapter", reading)


FILE_MUTANTS = (DoraSilentlyLora, ShardSavedAsWhole, MergedWithoutMagnitude, PickleRead)
