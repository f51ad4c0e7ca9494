"""Q1 to Q7, S6: the packed storage against bitsandbytes itself."""

import copy

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from torch_impl import DoraConfig, QuantConfig, apply_dora
from torch_impl.errors import NonFiniteError, StorageError
from torch_impl.layers.quant import (
    columns_of,
    decode,
    from_quant_state,
    is_finite,
    quantize,
    rows_of,
    view_bytes,
)

SHAPES = [(50, 96), (65, 66), (1, 66), (3, 3), (1, 1), (1, 2), (2, 1)]
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def by_the_clause(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Q4 on a flat tensor: nibbles, high first (Q3), through the code, times the absmax of blocks of 64 (Q1, Q6)."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    return state.code[nibbles] * absmax.repeat_interleave(64)[: nibbles.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q4_decode_is_code_times_absmax(
    shape: tuple[int, int], storage: torch.dtype, dtype: torch.dtype, *, nested: bool
) -> None:
    """Padded, viewed and cut back, the bytes that bitsandbytes packed decode to code times absmax of their block."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, state = bnb.quantize_4bit(W, blocksize=64, compress_statistics=nested, quant_type="nf4")

    stored, tensors, packed_format = quantize(W, QuantConfig(nested=nested, quant_storage=storage), name="W")

    assert stored.shape == (-(-packed.numel() // storage.itemsize), 1)
    assert stored.dtype == storage
    want = by_the_clause(packed, state)[: W.numel()].reshape(shape).to(dtype)
    assert torch.equal(decode(stored, tensors, packed_format, dtype=dtype).view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_q4_decode_casts_once_from_float32(dtype: torch.dtype) -> None:
    """Decoding to a narrow dtype is the float32 product, cast once."""
    W = torch.randn(65, 66, generator=torch.Generator().manual_seed(1))
    stored = quantize(W, QuantConfig(), name="W")

    assert torch.equal(decode(*stored, dtype=dtype), decode(*stored, dtype=torch.float32).to(dtype))


def test_q3_padding_is_zero_and_changes_no_bit() -> None:
    """Viewing adds zero bytes at the end and reinterprets the rest."""
    bytes_N = torch.arange(7, dtype=torch.uint8) + 250

    viewed = view_bytes(bytes_N, torch.float32)

    assert viewed.shape == (2, 1)
    assert viewed.view(torch.uint8).flatten().tolist() == [*bytes_N.tolist(), 0]


def test_q3_bytes_that_were_cut_off_are_refused() -> None:
    """Before anything would read beyond them."""
    packed, state = bnb.quantize_4bit(torch.randn(50, 96))

    with pytest.raises(StorageError, match=r"2399 packed bytes for \(50, 96\)"):
        from_quant_state(packed[:-1], state, storage=torch.uint8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_q7_non_finite_weights_are_refused_with_name_and_index(bad: float) -> None:
    """A NaN would poison every block through the mean: it is refused, and found."""
    W = torch.zeros(5, 6)
    W[3, 2] = bad

    with pytest.raises(NonFiniteError, match=r"layers\.0\.weight holds .* at index \(3, 2\)"):
        quantize(W, QuantConfig(), name="layers.0.weight")


@pytest.mark.parametrize("move", ["bfloat16", "half", "float", "double"])
def test_s6_casting_the_model_leaves_bytes_and_state_alone(move: str) -> None:
    """`model.to(dtype)` and its kin cast neither the packed bytes nor the absmax."""
    torch.manual_seed(0)
    layer = apply_dora(nn.Sequential(nn.Linear(66, 65)), DoraConfig(rank=2, alpha=4, quant="nf4"))[0]
    before = layer.base.decode(layer.base.weight, dtype=torch.float32)

    getattr(layer, move)()

    assert layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base.decode(layer.base.weight, dtype=torch.float32), before)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_s6_bytes_and_state_move_together(*, nested: bool) -> None:
    """To another device go the packed bytes and all that decodes them, and nothing of it trains there."""
    config = DoraConfig(rank=2, alpha=4, quant=QuantConfig(nested=nested))
    base = apply_dora(nn.Sequential(nn.Linear(66, 65)), config)[0].base

    base.to("meta")

    assert all(tensor.is_meta for tensor in (base.weight, *base.buffers()))
    assert not base.weight.requires_grad


def test_s6_copies_and_state_dicts_carry_the_bytes() -> None:
    """A deep copy and a loaded state dict decode to the same weight."""
    torch.manual_seed(0)
    first, second = (
        apply_dora(nn.Sequential(nn.Linear(66, 65)), DoraConfig(rank=2, alpha=4, quant="nf4"))[0] for _ in range(2)
    )
    second.load_state_dict(first.state_dict())
    weights = [m.base.decode(m.base.weight, dtype=torch.float32) for m in (first, second, copy.deepcopy(first))]

    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_s6_bytes_that_were_cast_are_refused() -> None:
    """Bytes that arrive in another dtype raise instead of decoding to finite garbage."""
    stored, tensors, packed_format = quantize(torch.randn(50, 96), QuantConfig(), name="W")

    with pytest.raises(StorageError, match=r"torch\.float16, not torch\.bfloat16"):
        decode(stored.to(torch.float16), tensors, packed_format, dtype=torch.float32)


PARTS = {False: ("absmax", "code"), True: ("nested_absmax", "nested_offset", "code")}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("nested", "part"), [(nested, part) for nested, parts in PARTS.items() for part in parts])
def test_q7_a_poisoned_quant_state_is_seen_without_decoding(*, nested: bool, part: str, bad: float) -> None:
    """Any part of the state that isn't finite is noticed, and a sound one passes."""
    _, state, packed_format = quantize(torch.randn(8, 64), QuantConfig(nested=nested), name="w")
    assert is_finite(state, packed_format)

    state[part].view(-1)[0] = bad

    assert not is_finite(state, packed_format)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(96, 256), (256, 192)], ids=str)
def test_s10_parts_of_a_packed_weight_decode_to_its_bits(
    shape: tuple[int, int], storage: torch.dtype, *, nested: bool
) -> None:
    """By rows and by columns, also where a nested block is cut; where none is, absmax stay in eight bits."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    packed = quantize(W, QuantConfig(nested=nested, quant_storage=storage), name="W")
    whole = decode(*packed, dtype=torch.float32)
    kept = set()
    for part, dim, count in ((rows_of, 0, shape[0] // 3), (rows_of, 0, shape[0] // 2), (columns_of, 1, 64)):
        for first in range(0, shape[dim] - count + 1, count):
            own = part(*packed, first=first, count=count)
            assert torch.equal(decode(*own, dtype=torch.float32), whole.narrow(dim, first, count))
            kept.add((part.__name__, own[2].nested_blocksize is not None))

    assert ("columns_of", True) not in kept
    assert (("rows_of", True) in kept) == nested
