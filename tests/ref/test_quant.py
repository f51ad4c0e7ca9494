"""Four-bit storage is bitsandbytes' format to the bit: tables, packing, decoding, both encoders, plain and nested."""

from fractions import Fraction
from itertools import pairwise

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from ref import encoders, quant, quant_fast
from ref.codebooks import DYNAMIC_CODE, FP4_CODE, NF4_CODE, NF4_OUTERMOST, nf4_from_quantiles
from ref.quant import QuantizationError, decode, encode, pack, unpack
from ref.types import NestedState, QuantState

SHAPES = [(65, 66), (50, 96), (1, 64), (3, 5), (64, 576), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAPABILITY = torch.backends.cpu.get_cpu_capability()
FLOAT32_U = 2.0**-24

of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
plain_and_nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
eager_and_jitted = pytest.mark.parametrize("run", [decode, jax.jit(decode)], ids=["eager", "jitted"])


def weight(*shape, dtype=torch.float32, seed=1):
    """Gaussian rows of very unequal sizes, so that scales differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(shape[0], 1, generator=generator))
    return (0.02 * rows * torch.randn(shape, generator=generator)).to(dtype)


def as_numpy(tensor):
    """The same bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def bnb_encode(tensor, *, nested, quant_type="nf4", blocksize=64):
    """Packed bytes and state, as bitsandbytes has them."""
    return bnb.quantize_4bit(tensor, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)


def bnb_decode(packed, state, count):
    """Its decoder, given the weight as one row: see `test_q1_its_avx512_decoder_takes_other_scales`."""
    row = bnb.QuantState(
        absmax=state.absmax,
        shape=torch.Size((1, count)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.offset,
        state2=state.state2,
    )
    return as_numpy(bnb.dequantize_4bit(packed, row)).reshape(-1)


def ours(state):
    """Its state as the reference's."""
    inner = None
    if state.state2 is not None:
        s2 = state.state2
        inner = NestedState(
            absmax=jnp.asarray(s2.absmax.numpy()),
            code=jnp.asarray(s2.code.numpy()),
            offset=jnp.asarray(state.offset.numpy()),
            blocksize=s2.blocksize,
        )
    return QuantState(
        absmax=jnp.asarray(state.absmax.numpy()),
        code=jnp.asarray(state.code.numpy()),
        nested=inner,
        blocksize=state.blocksize,
        shape=tuple(state.shape),
        dtype=str(state.dtype).removeprefix("torch."),
    )


def assert_same_bits(got, want):
    """Every bit, the sign of zero included."""
    got, want = np.ascontiguousarray(got).reshape(-1), np.ascontiguousarray(want).reshape(-1)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{want.itemsize}"))


def assert_encodes_as_bitsandbytes(tensor, *, nested, **kind):
    """Bytes, scales, nested scales: all equal to the bit, its offset given."""
    packed, state = bnb_encode(tensor, nested=nested, **kind)
    offset = float(state.offset) if nested else None

    got, got_state = encode(as_numpy(tensor), profile="bnb-cpu", nested=nested, offset=offset, **kind)

    assert_same_bits(got, packed.numpy())
    assert_same_bits(got_state.absmax, state.absmax.numpy())
    if nested:
        assert_same_bits(got_state.nested.absmax, state.state2.absmax.numpy())
        assert_same_bits(got_state.nested.offset, state.offset.numpy())


# --- Q2, Q6: tables ------------------------------------------------------------------------------------------------


def test_q2_nf4_code_is_bitsandbytes_own():
    """The 16 values are bitsandbytes' to the bit."""
    assert_same_bits(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu").numpy())


def test_q2_nf4_code_comes_from_normal_quantiles():
    """The derivation and the table agree within what seven digits of the outermost probability leave open."""
    from statistics import NormalDist  # noqa: PLC0415 - here only

    outermost = NormalDist().inv_cdf(NF4_OUTERMOST)
    half_a_digit = 0.5e-7
    left_open = half_a_digit / (NormalDist().pdf(outermost) * outermost)

    assert np.max(np.abs(nf4_from_quantiles() - NF4_CODE)) < left_open


@pytest.mark.skipif(CAPABILITY == "DEFAULT", reason="torch's linspace has no fused multiply-add here: another table")
def test_q6_dynamic_map_is_bitsandbytes_own():
    """The construction gives bitsandbytes' 256 values to the bit."""
    assert_same_bits(DYNAMIC_CODE, bnb.create_dynamic_map().numpy())


def test_q2_fp4_code_is_bitsandbytes_own():
    """The 16 values are bitsandbytes' to the bit."""
    assert_same_bits(FP4_CODE, bnb.get_4bit_type("fp4", device="cpu").numpy())


@pytest.mark.parametrize("code", [NF4_CODE, np.sort(FP4_CODE), DYNAMIC_CODE], ids=["nf4", "fp4", "dynamic"])
def test_q5_middles_are_short_enough_for_exact_comparison(code):
    """Every middle between neighbouring codes has at most 29 significant bits, as `nearest` supposes."""
    for low, high in pairwise(code):
        numerator = ((Fraction(float(low)) + Fraction(float(high))) / 2).numerator
        assert abs(numerator).bit_length() <= 29


# --- Q1, Q3: blocks and packing ------------------------------------------------------------------------------------


def test_q3_element_0_is_the_high_nibble():
    """Codes 1, 2 make the byte 0x12."""
    assert pack(jnp.asarray([1, 2], jnp.uint8)).tolist() == [0x12]


def test_q3_an_odd_count_is_filled_with_the_code_of_zero():
    """The filler of the last nibble decodes to 0."""
    assert pack(jnp.asarray([1, 2, 3], jnp.uint8)).tolist() == [0x12, 0x37]
    assert NF4_CODE[quant.ZERO_NIBBLE["nf4"]] == 0


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_q3_unpack_undoes_pack(count):
    """Every code comes back."""
    q = jnp.arange(count, dtype=jnp.uint8) % 16

    assert unpack(pack(q), count=count).tolist() == q.tolist()


def test_q3_filler_bytes_are_sliced_off():
    """Bytes that pad the storage to its item size do not reach the weight."""
    packed, state = encode(as_numpy(weight(65, 66)))

    padded = jnp.pad(packed, (0, 3), constant_values=255)

    assert_same_bits(decode(padded, state), decode(packed, state))


@pytest.mark.skipif(CAPABILITY != "AVX512", reason="only bitsandbytes' AVX-512 decoder does this")
def test_q1_its_avx512_decoder_takes_other_scales():
    """Where 16 divides `in` and 64 doesn't, bitsandbytes 0.50 restarts blocks at each row: a witness, not a rule.

    Its encoder does not, so what it decodes is off by a third. As one row the same bytes decode well.
    """
    tensor = weight(50, 96)
    packed, state = bnb_encode(tensor, nested=False)
    by_rows = bnb.dequantize_4bit(packed, state).numpy()
    as_one_row = bnb_decode(packed, state, tensor.numel()).reshape(50, 96)

    off = [np.linalg.norm(got - tensor.numpy()) / np.linalg.norm(tensor.numpy()) for got in (by_rows, as_one_row)]

    assert off[0] > 2 * off[1]


# --- Q4: decoding --------------------------------------------------------------------------------------------------


@eager_and_jitted
@plain_and_nested
@of_dtypes
@of_shapes
def test_q4_decode_is_bitwise(shape, dtype, nested, run):
    """Decoding bitsandbytes' own bytes gives bitsandbytes' own weight, to the bit."""
    packed, state = bnb_encode(weight(*shape, dtype=dtype), nested=nested)

    got = run(jnp.asarray(packed.numpy()), ours(state))

    assert got.shape == shape
    assert_same_bits(got, bnb_decode(packed, state, got.size))


@pytest.mark.parametrize("shape", [(65, 66), (3, 5), (64, 576)], ids=str)
def test_q4_decode_is_bitwise_by_rows(shape):
    """So it does where its own two-dimensional decoder reads the right scales."""
    packed, state = bnb_encode(weight(*shape), nested=True)

    assert_same_bits(decode(jnp.asarray(packed.numpy()), ours(state)), bnb.dequantize_4bit(packed, state).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.float64])
def test_q4_another_dtype_is_one_cast(dtype):
    """The target dtype is reached from the float32 product in one rounding."""
    packed, state = encode(as_numpy(weight(8, 64)))

    got = decode(packed, state, dtype=dtype)

    assert_same_bits(got, np.asarray(decode(packed, state)).astype(dtype))


def _sum(packed, state, addend):
    return decode(packed, state) + addend


def test_q4_no_fused_multiply_add():
    """Compiled together with an addition, the decoded weight is rounded first."""
    packed, state = encode(as_numpy(weight(256, 576)), nested=True)
    addend = jnp.asarray(as_numpy(weight(256, 576, seed=2)))

    assert_same_bits(jax.jit(_sum)(packed, state, addend), np.asarray(decode(packed, state)) + np.asarray(addend))


def test_q4_no_fused_multiply_add_with_a_constant_state():
    """Nor where the state is a constant of the compiled program."""
    packed, state = encode(as_numpy(weight(256, 576)), nested=True)
    addend = jnp.asarray(as_numpy(weight(256, 576, seed=2)))

    got = jax.jit(lambda p, a: _sum(p, state, a))(packed, addend)

    assert_same_bits(got, np.asarray(decode(packed, state)) + np.asarray(addend))


def test_q4_a_plain_product_is_fused():
    """The rounding is no idle precaution: without it XLA on CPU fuses. If this fails, `rounded_product` can go."""
    a, b, c = (jnp.asarray(as_numpy(weight(576, seed=seed, dtype=torch.float32).reshape(-1))) for seed in (1, 2, 3))

    fused = jax.jit(lambda a, b, c: a * b + c)(a, b, c)

    assert not np.array_equal(fused, np.asarray(a) * np.asarray(b) + np.asarray(c))


@pytest.mark.parametrize("b", [-2.0, -0.0, 0.0, 3.0])
@pytest.mark.parametrize("a", [-1.5, -0.0, 0.0, 0.1])
def test_q4_rounded_product_is_the_product(a, b):
    """Sign and magnitude are the product's for factors of any sign, zeros too."""
    a, b = jnp.full(1, a, jnp.float32), jnp.full(1, b, jnp.float32)

    assert_same_bits(quant.rounded_product(a, b), np.asarray(a) * np.asarray(b))


def test_q4_too_few_bytes_are_refused():
    """Bytes or scales that cannot fill the shape are counted in the error."""
    packed, state = encode(as_numpy(weight(65, 66)))

    with pytest.raises(QuantizationError, match="2144 bytes came, the shape needs 2145"):
        decode(packed[:-1], state)


def test_q4_too_few_scales_are_refused():
    """Likewise the scales."""
    packed, state = encode(as_numpy(weight(65, 66)))
    short = QuantState(state.absmax[:-1], state.code, None, state.blocksize, state.shape)

    with pytest.raises(QuantizationError, match="67 scales came, the shape needs 68"):
        decode(packed, short)


# --- Q5: encoding --------------------------------------------------------------------------------------------------


@plain_and_nested
@of_dtypes
@of_shapes
def test_q5_bnb_cpu_is_bitwise(shape, dtype, nested):
    """Bytes and scales are bitsandbytes' for every shape and dtype."""
    assert_encodes_as_bitsandbytes(weight(*shape, dtype=dtype), nested=nested)


@plain_and_nested
@of_dtypes
def test_q5_bnb_cpu_is_bitwise_on_many(dtype, nested):
    """So they are for a million values and more."""
    assert_encodes_as_bitsandbytes(weight(1737, 576, dtype=dtype), nested=nested)


EXTREMES = [1e-45, 1e-40, 1.2e-38, 1e-20, 6e4, 1e30, 3e38]


@plain_and_nested
@of_dtypes
def test_q5_bnb_cpu_is_bitwise_on_extreme_blocks(dtype, nested):
    """Blocks of zeros, denormal, tiny and huge numbers, side by side, get bitsandbytes' bytes in every dtype."""
    sizes = torch.tensor([0.0, *(size for size in EXTREMES if size < torch.finfo(dtype).max)])
    if nested:
        sizes = sizes[sizes < 1e20]  # beyond, the float32 differences of scales are its own

    values = (sizes[:, None] * torch.linspace(-1, 1, 64)[None, :]).to(dtype)

    assert_encodes_as_bitsandbytes(values, nested=nested)


def ties(scale):
    """Every middle between neighbouring codes times the scale, with its two float neighbours, in blocks of 64."""
    middles = ((NF4_CODE[:-1].astype(np.float64) + NF4_CODE[1:]) / 2 * float(scale)).astype(np.float32)
    values = np.concatenate([np.nextafter(middles, -np.inf), middles, np.nextafter(middles, np.inf)])
    return np.concatenate([[scale], values, np.zeros(64 - 1 - len(values))]).astype(np.float32).reshape(1, 64)


SCALES = [1.0, 0.7, 3.0, 0.02345, 1e30, 1e-30, 2.0**126, 2.0**-120]


@pytest.mark.parametrize("scale", SCALES)
def test_q5_bnb_cpu_breaks_ties_alike(scale):
    """Every middle and its two neighbours, in blocks of many sizes, get bitsandbytes' codes."""
    assert_encodes_as_bitsandbytes(torch.from_numpy(ties(np.float32(scale))), nested=False)


@pytest.mark.parametrize("scale", SCALES)
def test_q5_bnb_cpu_divides_in_a_short_block(scale):
    """The same values in a short last block, which bitsandbytes divides, get its codes too."""
    assert_encodes_as_bitsandbytes(torch.from_numpy(ties(np.float32(scale))[:, :46]), nested=False)


@pytest.mark.parametrize("scale", SCALES)
def test_q5_exact_takes_the_nearest_and_the_lower_of_two(scale):
    """In rational arithmetic no code is nearer, and none as near is lower."""
    values = ties(np.float32(scale))

    packed, state = encode(values)

    codes = [Fraction(float(c)) * Fraction(float(state.absmax[0])) for c in NF4_CODE]
    want = [min(range(16), key=lambda k: (abs(codes[k] - Fraction(float(v))), k)) for v in values.reshape(-1)]
    assert unpack(packed, count=64).tolist() == want


def test_q5_exact_breaks_a_true_tie_downwards():
    """Halfway between 0 and the next code is exactly representable, and gets the code of 0."""
    values = np.array([[1.0, NF4_CODE[8] / 2]], np.float32)

    assert encode(values)[0].tolist() == [0xF7]


def test_q5_the_profiles_are_two():
    """The reciprocal moves some value over a middle, so that the profiles are not one."""
    values = np.concatenate([ties(np.float32(s)) for s in SCALES])

    assert encode(values)[0].tolist() != encode(values, profile="bnb-cpu")[0].tolist()


@plain_and_nested
def test_q5_one_hot_blocks(nested):
    """Blocks with one value, at each place, and a block of zeros are coded alike."""
    values = torch.cat([torch.eye(64), -torch.eye(64), torch.zeros(1, 64)]) * 0.37

    assert_encodes_as_bitsandbytes(values, nested=nested)


def test_q5_zero_blocks():
    """A block of zeros decodes to positive zeros; a short last one keeps the tiny scale that bitsandbytes gives it."""
    assert_encodes_as_bitsandbytes(torch.zeros(3, 30), nested=False)

    packed, state = encode(np.zeros((3, 30), np.float32), profile="bnb-cpu")

    assert_same_bits(decode(packed, state), np.zeros((3, 30), np.float32))


def test_q5_8_bit_codes_at_every_bin_border():
    """Values around each border of a bin where the table changes, by steps of 2^-25, get bitsandbytes' code."""
    middles = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / np.float32(2)
    values = -1 + 2 * np.arange(encoders.BINS) / (encoders.BINS - 1)
    changes = np.nonzero(np.diff(np.searchsorted(middles, values.astype(np.float32))))[0]
    borders = ((changes + 0.5) / (encoders.BINS - 1) * 2 - 1).astype(np.float32)
    near = np.concatenate([borders + np.float32(step * 2.0**-25) for step in range(-64, 65)])
    blocks = np.pad(near, (0, -len(near) % 255)).reshape(-1, 255)
    residual = np.concatenate([np.ones((len(blocks), 1), np.float32), blocks], axis=1).reshape(-1)

    want, _ = bnb.quantize_blockwise(torch.from_numpy(residual), blocksize=256)

    scales = encoders.block_absmax(residual, encoders.NESTED_BLOCKSIZE)
    assert_same_bits(encoders._bnb_cpu_codes(residual, scales), want.numpy())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", quant.BLOCKSIZES)
def test_q1_every_blocksize(blocksize, quant_type):
    """Bytes and scales are those of blocks of any size that bitsandbytes has, the last one short."""
    assert_encodes_as_bitsandbytes(weight(67, 99), nested=True, blocksize=blocksize, quant_type=quant_type)


# --- FP4 -----------------------------------------------------------------------------------------------------------


@plain_and_nested
@of_dtypes
@of_shapes
def test_q5_fp4_is_bitwise(shape, dtype, nested):
    """In FP4, too, bytes and scales are bitsandbytes', the codes of small numbers included."""
    tensor = weight(*shape, dtype=dtype)
    tensor[0, 0] = 0.0

    assert_encodes_as_bitsandbytes(tensor, nested=nested, quant_type="fp4")


@eager_and_jitted
@plain_and_nested
@of_shapes
def test_q4_fp4_decode_is_bitwise(shape, nested, run):
    """Decoding bitsandbytes' own FP4 bytes gives its own weight; its decoders disagree on the sign of code 8's zero."""
    packed, state = bnb_encode(weight(*shape), nested=nested, quant_type="fp4")

    got = run(jnp.asarray(packed.numpy()), ours(state))

    assert_same_bits(np.asarray(got) + np.float32(0), bnb_decode(packed, state, got.size) + np.float32(0))


@pytest.mark.parametrize("scale", SCALES)
def test_q5_fp4_exact_takes_the_nearest(scale):
    """In rational arithmetic no FP4 code is nearer; of 0 and -0 it is 0, and of two equally near the lower value."""
    middles = ((np.sort(FP4_CODE)[:-1].astype(np.float64) + np.sort(FP4_CODE)[1:]) / 2 * scale).astype(np.float32)
    around = np.concatenate([np.nextafter(middles, -np.inf), middles, np.nextafter(middles, np.inf)])
    values = np.concatenate([np.array([scale], np.float32), around]).reshape(1, -1)

    packed, state = encode(values, quant_type="fp4")

    codes = [Fraction(float(c)) * Fraction(float(state.absmax[0])) for c in FP4_CODE]
    want = [min(range(16), key=lambda k: (abs(codes[k] - Fraction(float(v))), codes[k], k)) for v in values[0]]
    assert unpack(packed, count=values.size).tolist() == want


# --- Q5: the CUDA profile, from source -----------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_q5_bnb_cuda_codes_a_zero_block_as_nibble_0(quant_type):
    """A block of zeros is 0 times infinity there: nibble 0, which in NF4 decodes to -0.0."""
    packed, state = encode(np.zeros((1, 64), np.float32), profile="bnb-cuda", quant_type=quant_type)

    assert not packed.any()
    assert_same_bits(decode(packed, state), np.full((1, 64), -0.0 if quant_type == "nf4" else 0.0, np.float32))


@pytest.mark.parametrize("scale", SCALES[:5])
def test_q5_bnb_cuda_is_bnb_cpu_in_whole_nf4_blocks(scale):
    """The pivots in its kernel are the middles, rounded to float32, so whole blocks that are not zero agree."""
    values = ties(np.float32(scale))

    assert encode(values, profile="bnb-cuda")[0].tolist() == encode(values, profile="bnb-cpu")[0].tolist()


def test_q5_bnb_cuda_fp4_is_divided_in_the_middle():
    """A millionth beside the middle of two of FP4's magnitudes, each value has the code of the nearer."""
    code = FP4_CODE[:8]
    magnitudes = np.sort(code)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    values = np.concatenate([[1.0], middles - 1e-6, middles + 1e-6, [0.0]]).astype(np.float32)[None]

    packed, _ = encode(values, profile="bnb-cuda", quant_type="fp4")

    nibbles = np.stack([packed.ravel() >> 4, packed.ravel() & 15], axis=1).ravel()
    assert code[nibbles].tolist() == [1.0, *magnitudes[:-1], *magnitudes[1:], 0.0]


def test_q5_bnb_cuda_fp4_keeps_signs():
    """A sign bit and a magnitude: small positive values get code 0 and small negative ones code 8."""
    packed, _ = encode(np.array([[1.0, 1e-4, -1e-4, -1.0]], np.float32), profile="bnb-cuda", quant_type="fp4")

    assert unpack(packed, count=4).tolist() == [0b0011, 0b0000, 0b1000, 0b1011]


@pytest.mark.parametrize(("low", "want"), [(3, 4), (4, 4)])
def test_q5_bnb_cuda_8_bit_ties_go_to_even(low, want):
    """Its search ends on an even code, which keeps what lies halfway."""
    middle = (DYNAMIC_CODE[low] + DYNAMIC_CODE[low + 1]) / np.float32(2)
    residual = np.array([1.0, middle], np.float32)

    assert encoders._bnb_cuda_codes(residual, np.ones(1, np.float32)).tolist() == [255, want]


def test_q5_bnb_cuda_8_bit_codes_of_a_zero_block():
    """A block of equal scales is coded 0, and decodes to the offset."""
    assert encoders._bnb_cuda_codes(np.zeros(2, np.float32), np.zeros(1, np.float32)).tolist() == [0, 0]


# --- Q4, Q5: the fast twins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@of_dtypes
@of_shapes
def test_q5_fast_encode_is_the_encoder(shape, dtype, blocksize):
    """Compiled, the bytes and scales are those of the specification's `bnb-cpu`."""
    W = jnp.asarray(as_numpy(weight(*shape, dtype=dtype)))

    packed, state = quant_fast.encode_nf4(W, blocksize=blocksize)

    want, want_state = encode(np.asarray(W), profile="bnb-cpu", blocksize=blocksize)
    assert_same_bits(packed, want)
    assert_same_bits(state.absmax, want_state.absmax)
    assert (state.shape, state.dtype) == (want_state.shape, want_state.dtype)


@pytest.mark.parametrize("scale", SCALES)
def test_q5_fast_encode_breaks_ties_alike(scale):
    """Around every middle as well, in whole blocks and in a short one."""
    values = np.concatenate([ties(np.float32(scale)).reshape(-1), ties(np.float32(scale)).reshape(-1)[:46]])

    packed, _ = quant_fast.encode_nf4(jnp.asarray(values))

    assert packed.tolist() == encode(values, profile="bnb-cpu")[0].tolist()


@plain_and_nested
@of_dtypes
@of_shapes
def test_q4_fast_decode_is_the_decoder(shape, dtype, nested):
    """Compiled by blocks, the weight is the specification's, to the bit."""
    packed, state = encode(as_numpy(weight(*shape, dtype=dtype)), nested=nested)

    assert_same_bits(quant_fast.decode(packed, state), decode(packed, state))


def test_q4_fast_decode_is_not_fused():
    """Compiled together with an addition, it is rounded first, as the specification's is."""
    packed, state = encode(as_numpy(weight(256, 576)), nested=True)
    addend = jnp.asarray(as_numpy(weight(256, 576, seed=2)))

    got = jax.jit(lambda p, s, a: quant_fast.decode(p, s) + a)(packed, state, addend)

    assert_same_bits(got, np.asarray(decode(packed, state)) + np.asarray(addend))


def test_q7_fast_encode_refuses_what_is_not_finite():
    """The block with the value is named."""
    with pytest.raises(QuantizationError, match="from index 64 on"):
        quant_fast.encode_nf4(jnp.zeros((2, 64)).astype(jnp.float32).at[1, 3].set(jnp.nan))


# --- Q8: another format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "want"), [(NF4_CODE, "nf4"), (FP4_CODE, "fp4")], ids=["nf4", "fp4"])
def test_q8_known_codebooks_are_known(code, want):
    """The two codebooks are told by their bits."""
    assert quant.require_known_code(code) == want


def test_q8_another_codebook_is_refused():
    """A table of four decimals, as torchao's, is another format, and said to be."""
    with pytest.raises(QuantizationError, match="not bitsandbytes'"):
        quant.require_known_code(np.round(NF4_CODE, 4))


# --- Q6: nested ----------------------------------------------------------------------------------------------------


def test_q6_the_offset_is_the_mean():
    """Not given, the offset is the mean of the scales, off bitsandbytes' by its float32 summation at most."""
    tensor = weight(64, 576)
    _, state = bnb_encode(tensor, nested=True)
    _, plain = bnb_encode(tensor, nested=False)

    _, got = encode(as_numpy(tensor), profile="bnb-cpu", nested=True)

    terms = plain.absmax.numel()
    rigorous = (terms + 1) * FLOAT32_U * float(plain.absmax.abs().double().mean())
    assert abs(float(got.nested.offset) - float(state.offset)) <= rigorous


@pytest.mark.parametrize("profile", ["exact", "bnb-cpu"])
def test_q6_equal_scales_survive(profile):
    """Where all scales are equal, nothing is left to code and they come back exactly."""
    values = np.tile(np.linspace(-0.37, 0.37, 64, dtype=np.float32), (8, 1))

    _, state = encode(values, profile=profile, nested=True)

    assert_same_bits(quant.decode_absmax(state), np.full(8, 0.37, np.float32))


def test_q6_exact_codes_are_the_nearest():
    """No 8-bit code is nearer to a scale's residual than the one it gets."""
    _, state = encode(as_numpy(weight(64, 576)), nested=True)
    _, plain = encode(as_numpy(weight(64, 576)))
    residual = np.asarray(plain.absmax) - np.asarray(state.nested.offset)
    scale = np.repeat(np.asarray(state.nested.absmax), 256)[: len(residual)].astype(np.float64)

    distance = np.abs(DYNAMIC_CODE[None, :] * scale[:, None] - residual[:, None])

    np.testing.assert_array_equal(state.absmax, np.argmin(distance, axis=1))


# --- Q7: refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_q7_a_value_that_is_not_finite_is_named(bad):
    """The first such value's index stands in the error."""
    values = np.ones((4, 8), np.float32)
    values[2, 3] = bad

    with pytest.raises(QuantizationError, match=r"index \(2, 3\)"):
        encode(values)


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        pytest.param(np.ones((2, 2)), {}, "float64", id="float64"),
        pytest.param(np.ones((0, 4), np.float32), {}, "empty", id="empty"),
        pytest.param(np.ones((2, 2), np.float32), {"blocksize": 48}, "blocksize 48", id="blocksize"),
    ],
)
def test_what_has_no_code_is_refused(values, options, said):
    """Another dtype, nothing at all, or a blocksize of nobody's is named."""
    with pytest.raises(QuantizationError, match=said):
        encode(values, **options)
