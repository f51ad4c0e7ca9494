"""Bugs of the 4-bit storage: Q1 to Q7, C2, S6."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from parity.case import Case
from parity.implementations.mutants.base import Mutant
from parity.job import Place
from torch_impl.layers import dora as layers
from torch_impl.layers import quant
from torch_impl.sharding import apply as sharding

_BLOCK = 64


class NibbleSwap(Mutant):
    """Element 0 goes to the low nibble."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Swap after bitsandbytes has packed."""
        pack = functional.quantize_4bit

        def swapped(*args: object, **options: object) -> tuple[Tensor, object]:
            packed, state = pack(*args, **options)
            return (packed >> 4) | (packed << 4), state

        return mock.patch.object(functional, "quantize_4bit", swapped)


class Nf4TieUp(Mutant):
    """A tie goes to the upper code: every number but its block's largest is encoded as its upper neighbour."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Nudge before bitsandbytes encodes."""
        pack = functional.quantize_4bit

        def nudged(weight: Tensor, *args: object, **options: object) -> tuple[Tensor, object]:
            up = torch.nextafter(weight, torch.full_like(weight, torch.inf))
            return pack(torch.where(_largest(weight), weight, up), *args, **options)

        return mock.patch.object(functional, "quantize_4bit", nudged)


def _largest(weight: Tensor) -> Tensor:
    """Which elements have their block's absmax."""
    flat = weight.abs().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    return (padded == padded.amax(1, keepdim=True)).flatten()[: len(flat)].view(weight.shape)


class BlocksByRow(Mutant):
    """A block begins anew with each row of an even length."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Decode each row by itself, with the scales from where its own would begin."""
        decode = quant.decode

        def by_row(stored: Tensor, tensors: dict, packed_format: quant.PackedFormat, *, dtype: torch.dtype) -> Tensor:
            rows, columns = packed_format.shape
            if columns % 2:
                return decode(stored, tensors, packed_format, dtype=dtype)
            row = dataclasses.replace(packed_format, shape=(1, columns))
            decoded = [
                decode(part, tensors | {"absmax": tensors["absmax"][number * (columns // _BLOCK) :]}, row, dtype=dtype)
                for number, part in enumerate(stored.view(rows, -1))
            ]
            return torch.cat(decoded)

        return mock.patch.object(quant, "decode", by_row)


class NestedOffsetForgotten(Mutant):
    """The scales' mean, which was taken off before they were coded, is not added again."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Decode without it."""
        decode = quant.decode

        def without(stored: Tensor, tensors: dict, packed_format: quant.PackedFormat, *, dtype: torch.dtype) -> Tensor:
            offset = tensors.get("nested_offset")
            changed = tensors if offset is None else tensors | {"nested_offset": torch.zeros_like(offset)}
            return decode(stored, changed, packed_format, dtype=dtype)

        return mock.patch.object(quant, "decode", without)


class OtherCode(Mutant):
    """NF4's sixteen values from quantiles computed anew, which round to others in six places."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """One unit in the last place of a value."""
        decode = quant.decode

        def other(stored: Tensor, tensors: dict, packed_format: quant.PackedFormat, *, dtype: torch.dtype) -> Tensor:
            weight = decode(stored, tensors, packed_format, dtype=torch.float32)
            scales = decode(torch.full_like(stored, 0xFF), tensors, packed_format, dtype=torch.float32)
            tenth = weight == scales * tensors["code"][10]
            return torch.where(tenth, torch.nextafter(weight, 2 * weight), weight).to(dtype)

        return mock.patch.object(quant, "decode", other)


class NotANumberTaken(Mutant):
    """A weight is packed without a look at whether it is finite."""

    def planted(self, case: Case, place: Place) -> contextlib.AbstractContextManager[object]:
        """Refuse nothing."""
        return mock.patch.object(quant, "refuse_non_finite", return_value=None)


class StorageCast(Mutant):
    """FSDP2 casts the bytes, stored as bfloat16, to float16 when it gathers them."""

    @contextlib.contextmanager
    def planted(self, case: Case, place: Place) -> Iterator[None]:
        """Give packed units a policy, and take away the guard that would notice."""
        decode = quant.decode

        def unguarded(
            stored: Tensor, tensors: dict, packed_format: quant.PackedFormat, *, dtype: torch.dtype
        ) -> Tensor:
            return decode(stored.view(packed_format.storage), tensors, packed_format, dtype=dtype)

        def casting(module: nn.Module, **options: object) -> nn.Module:
            if isinstance(module, layers.PackedBase):
                options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float16, cast_forward_inputs=False)
            return fully_shard(module, **options)

        with mock.patch.object(quant, "decode", unguarded), mock.patch.object(sharding, "fully_shard", casting):
            yield


STORAGE_MUTANTS = (NibbleSwap, Nf4TieUp, BlocksByRow, NestedOffsetForgotten, OtherCode, NotANumberTaken, StorageCast)
