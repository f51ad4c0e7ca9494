"""Four-bit storage of a base weight: quantise with bitsandbytes, hold the bytes as a float parameter, decode.

Axes: O output features, I input features. `packed` is (n, 1) of the storage dtype, `bytes` uint8.
Clauses: Q1 blocks, Q3 pack and padding, Q4 decode, Q6 nested, Q7 non-finite, S6 opaque bytes.

Weights are always quantised to uint8; the bytes are then padded to the storage's item size and *viewed* (bitsandbytes
would raise where they don't divide, Q3). The view is cut back before decoding: padding never reaches the decoder.

Decoding goes through one flat row of an even count: bitsandbytes 0.50.2's CPU decoder starts a block anew with each row
of the shape it is told, so a weight whose I is no multiple of the blocksize comes out wrong from its own quant state
(50 x 96: an element off by 1.6; Q1 says that blocks run through).

bitsandbytes is imported where it works, not where this module is: it loads torch's compiler, half as much as torch.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_impl.config import COMPUTE_DTYPES, QuantConfig
from torch_impl.errors import DtypeError, NonFiniteError, StorageError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True)
class PackedFormat:
    """What the bytes mean: all of the quant state that is no tensor, plus the storage."""

    shape: tuple[int, ...]
    """(O, I) of the weight, or (E, O, I)."""
    dtype: torch.dtype
    """The weight's dtype before it was packed."""
    blocksize: int
    """Elements that share one absmax (Q1)."""
    quant_type: str
    """bitsandbytes' name of the codebook (Q2)."""
    storage: torch.dtype
    """What the bytes are viewed as (Q3)."""
    nested_blocksize: int | None
    """Absmax that share one second absmax (Q6); None where absmax are plain float32."""

    @property
    def nbytes(self) -> int:
        """Bytes that carry nibbles: two elements each, an odd last one padded (Q1)."""
        return -(-math.prod(self.shape) // 2)


def refuse_non_finite(tensor: Tensor, name: str) -> None:
    """Q7: a weight with NaN or infinity is refused, with its name and the first bad index.

    Raises:
        NonFiniteError: some element isn't finite.
    """
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
        index = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
        raise NonFiniteError(
            f"{name} holds {tensor[index].item()} at index {index}",
            hint="mend the checkpoint: DoRA divides by row norms",
        )


def view_bytes(bytes_N: Tensor, storage: torch.dtype) -> Tensor:
    """Q3: packed bytes as (n, 1) of the storage dtype, zero-padded to its item size; no bit changes."""
    padding = -bytes_N.numel() % storage.itemsize
    padded = torch.cat([bytes_N.flatten(), bytes_N.new_zeros(padding)])
    return padded.view(storage).reshape(-1, 1)


def quantize(W_OI: Tensor, config: QuantConfig, *, name: str) -> tuple[Tensor, dict[str, Tensor], PackedFormat]:
    """Pack a finite weight: the stored tensor, the quant state's tensors by name, the format.

    Raises:
        NonFiniteError: the weight isn't finite.
        DtypeError: bitsandbytes doesn't pack its dtype.
    """
    if W_OI.dtype not in COMPUTE_DTYPES:
        raise DtypeError(f"{name} is {W_OI.dtype}, which can't be packed", hint=f"cast it to one of {COMPUTE_DTYPES}")
    refuse_non_finite(W_OI, name)
    from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415 - see the top

    packed, state = quantize_4bit(
        W_OI.detach().contiguous(),
        blocksize=config.blocksize,
        compress_statistics=config.nested,
        quant_type=config.quant_type,
        quant_storage=torch.uint8,
    )
    return from_quant_state(packed, state, storage=config.quant_storage)


def from_quant_state(
    packed: Tensor, state: "QuantState", *, storage: torch.dtype
) -> tuple[Tensor, dict[str, Tensor], PackedFormat]:
    """Take over what bitsandbytes holds: its bytes (in any storage) and its quant state."""
    nested = state.state2
    packed_format = PackedFormat(
        shape=tuple(state.shape),
        dtype=state.dtype,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        storage=storage,
        nested_blocksize=nested.blocksize if nested else None,
    )
    tensors = {"absmax": state.absmax, "code": state.code}
    if nested:
        tensors |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "nested_offset": state.offset}
    bytes_N = packed.detach().contiguous().view(torch.uint8).flatten()
    if bytes_N.numel() < packed_format.nbytes:
        raise StorageError(
            f"{bytes_N.numel()} packed bytes for {packed_format.shape}", hint=f"{packed_format.nbytes} are needed"
        )
    return view_bytes(bytes_N[: packed_format.nbytes], storage), tensors, packed_format


def decode(stored: Tensor, tensors: dict[str, Tensor], packed_format: PackedFormat, *, dtype: torch.dtype) -> Tensor:
    """Q4: the weight (O, I), code times absmax in float32 with one cast to `dtype` (float32, bfloat16 or float16).

    Raises:
        StorageError: the bytes were cast on the way here (S6).
    """
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - see the top

    if stored.dtype != packed_format.storage:
        raise StorageError(
            f"packed bytes arrive as {stored.dtype}, not {packed_format.storage}", hint="never cast them (S6)"
        )
    bytes_N1 = stored.view(torch.uint8).reshape(-1, 1)[: packed_format.nbytes]
    state = _quant_state(tensors, packed_format, dtype=dtype)
    W_N = dequantize_4bit(bytes_N1, quant_state=state)
    return W_N.flatten()[: math.prod(packed_format.shape)].reshape(packed_format.shape)


def bytes_of_matrix(stored: Tensor, packed_format: PackedFormat, *, index: int) -> Tensor:
    """The bytes of one of a stack of matrices, each of whole blocks: a view, uint8."""
    length = packed_format.nbytes // packed_format.shape[0]
    return stored.view(torch.uint8).reshape(-1)[index * length : (index + 1) * length]


def decode_matrix(
    stored: Tensor, tensors: dict[str, Tensor], packed_format: PackedFormat, *, index: int, dtype: torch.dtype
) -> Tensor:
    """Q4 of one of a stack of matrices (O, I), of its own bytes: the same bits as in the whole.

    Its absmax may begin amid a nested block (Q6): these are decoded from that block's beginning.
    """
    shape = packed_format.shape[1:]
    count = math.prod(shape) // packed_format.blocksize
    absmax = _plain_absmax(tensors, packed_format, first=index * count, last=(index + 1) * count)
    own = replace(packed_format, shape=shape, storage=torch.uint8, nested_blocksize=None)
    return decode(stored, {"absmax": absmax, "code": tensors["code"]}, own, dtype=dtype)


def _plain_absmax(tensors: dict[str, Tensor], packed_format: PackedFormat, *, first: int, last: int) -> Tensor:
    """Q6: a range of the absmax in float32; where they are nested, decoded from the beginning of a nested block."""
    from bitsandbytes.functional import dequantize_blockwise  # noqa: PLC0415 - see the top

    nested = packed_format.nested_blocksize
    if nested is None:
        return tensors["absmax"][first:last].contiguous()
    group = first // nested
    absmax = dequantize_blockwise(
        tensors["absmax"][group * nested : last].contiguous(),
        absmax=tensors["nested_absmax"][group:].contiguous(),
        code=tensors["nested_code"],
        blocksize=nested,
    )
    return (absmax + tensors["nested_offset"])[first - group * nested :].contiguous()


def rows_of(
    stored: Tensor, tensors: dict[str, Tensor], packed_format: PackedFormat, *, first: int, count: int
) -> tuple[Tensor, dict[str, Tensor], PackedFormat]:
    """S10: consecutive rows of a packed weight, of whole blocks, packed; the bytes (n, 1) are a view.

    Absmax stay nested where the rows begin with a nested block (Q6); elsewhere they are decoded, to the same bits.
    """
    width = packed_format.shape[1]
    blocks = [edge * width // packed_format.blocksize for edge in (first, first + count)]
    items = [edge * width // 2 // packed_format.storage.itemsize for edge in (first, first + count)]
    own = replace(packed_format, shape=(count, width))
    nested = packed_format.nested_blocksize
    if nested is None or blocks[0] % nested:
        absmax = _plain_absmax(tensors, packed_format, first=blocks[0], last=blocks[1])
        state = {"absmax": absmax, "code": tensors["code"]}
        return stored[slice(*items)], state, replace(own, nested_blocksize=None)
    groups = slice(blocks[0] // nested, -(-blocks[1] // nested))
    kept = {"absmax": tensors["absmax"][slice(*blocks)], "nested_absmax": tensors["nested_absmax"][groups]}
    return stored[slice(*items)], tensors | {name: tensor.clone() for name, tensor in kept.items()}, own


def columns_of(
    stored: Tensor, tensors: dict[str, Tensor], packed_format: PackedFormat, *, first: int, count: int
) -> tuple[Tensor, dict[str, Tensor], PackedFormat]:
    """S10: consecutive columns of a packed weight, of whole blocks of each row, packed; the bytes are (O, n).

    Absmax are decoded where they are nested (Q6), to the same bits: each rank has some of every nested block.
    """
    (height, width), size = packed_format.shape, packed_format.blocksize
    absmax = _plain_absmax(tensors, packed_format, first=0, last=height * width // size).reshape(height, -1)
    items = [edge // 2 // packed_format.storage.itemsize for edge in (first, first + count)]
    state = {
        "absmax": absmax[:, first // size : (first + count) // size].flatten().contiguous(),
        "code": tensors["code"],
    }
    own = replace(packed_format, shape=(height, count), nested_blocksize=None)
    return stored.reshape(height, -1)[:, slice(*items)].contiguous(), state, own


def is_finite(tensors: dict[str, Tensor], packed_format: PackedFormat) -> bool:
    """Q7: whether a packed weight surely decodes to finite numbers, as its quant state bounds them: no decoding."""
    absmax = tensors["absmax"].abs().amax().double()
    if packed_format.nested_blocksize is not None:
        nested = tensors["nested_absmax"].abs().amax().double() * tensors["nested_code"].abs().amax()
        absmax = nested + tensors["nested_offset"].abs()
    return bool(absmax * tensors["code"].abs().amax() <= torch.finfo(torch.float32).max)


def _quant_state(tensors: dict[str, Tensor], packed_format: PackedFormat, *, dtype: torch.dtype) -> "QuantState":
    """The state object that bitsandbytes decodes with, made of our buffers."""
    from bitsandbytes.functional import QuantState  # noqa: PLC0415 - see the top

    nested = None
    if packed_format.nested_blocksize is not None:
        nested = QuantState(
            absmax=tensors["nested_absmax"],
            code=tensors["nested_code"],
            blocksize=packed_format.nested_blocksize,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=tensors["absmax"],
        shape=torch.Size([1, 2 * packed_format.nbytes]),  # one row: what it is told and what it gives agree so
        code=tensors["code"],
        blocksize=packed_format.blocksize,
        quant_type=packed_format.quant_type,
        dtype=dtype,
        offset=tensors.get("nested_offset"),
        state2=nested,
    )
