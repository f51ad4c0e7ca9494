"""The 4-bit storage as `torch_impl` holds it: packed bytes, absmax and the decoded weight of each layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from parity.case import Case, DecodeCase
from parity.implementations.observed import to_numpy
from parity.implementations.torch_stack import DTYPES
from parity.inputs import stack_inputs
from parity.job import Place
from parity.shard import Shard, whole_index
from torch_impl import QuantConfig
from torch_impl.layers import quant

FOUR_BIT = ("nf4", "fp4")
"""Bases that are coded."""


def quant_config(case: Case) -> QuantConfig:
    """Q1, Q2, Q6: how the case's base is coded."""
    return QuantConfig(quant_type=case.base, blocksize=case.blocksize, nested=not case.flat)


def codec_shards(case: DecodeCase, place: Place) -> Iterator[Shard]:
    """Quantise each layer's weight and give what is stored and what is read back."""
    inputs = stack_inputs(case)
    for position in range(len(case.layers)):
        name = f"layers.{position}.weight"
        weight = torch.from_numpy(inputs[name].copy()).to(place.device, DTYPES[case.compute])
        stored, state, packed_format = quant.quantize(weight, quant_config(case), name=name)
        for kind, tensor in (
            ("packed", stored.view(torch.uint8).flatten()[: packed_format.nbytes]),
            ("absmax", state["absmax"]),
            ("decoded", quant.decode(stored, state, packed_format, dtype=DTYPES[case.compute])),
        ):
            array = to_numpy(tensor)
            yield Shard(
                name=name, kind=kind, step=0, global_shape=array.shape, index=whole_index(array.shape), array=array
            )
