"""Inputs depend on the case alone; a lattice is exact or refused; tokens are dealt once."""

import dataclasses
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from parity import inputs
from parity.case import NetworkCase, StackCase
from parity.cases import cases_of
from parity.errors import LatticeNotExact
from parity.inputs import deal_tokens, input_seed, parts, stack_inputs
from parity.inputs.certificate import certify, require_long_sums
from parity.inputs.lattice import _has_loud_token
from parity.inputs.network import MAGNITUDE_PATTERN, adapter_factors, starting_magnitude
from parity.inputs.ties import NF4, tied_weight
from ref.codebooks import NF4_CODE

QUICK = {case.id: case for case in cases_of("quick")}
PLAIN = QUICK["stack/lattice/torch_impl/fsdp2-w3/uneven/float32-float32/plain"]
PACKED = QUICK["stack/lattice/torch_impl/fsdp2-w3/uneven/nf4-float32/plain"]
GAUSSIAN = dataclasses.replace(
    QUICK["stack/one-hot/torch_impl/fsdp2-w2/uneven/bfloat16-bfloat16/plain"], world=3, steps=3
)
DRAWN = [case for case in QUICK.values() if isinstance(case, StackCase)]
LATTICES = list({input_seed(case): case for case in DRAWN if case.inputs == "lattice"}.values())
EACH_LATTICE = pytest.mark.parametrize("case", LATTICES, ids=lambda case: case.id)


def drawn(case):
    """The arrays, drawn again whatever was drawn before."""
    return inputs._drawn.__wrapped__(case)


def same(left, right):
    """Whether two sets of arrays are one, to the bit."""
    return left.keys() == right.keys() and all(left[k].tobytes() == right[k].tobytes() for k in left)


# from the case alone


@pytest.mark.parametrize("case", [PLAIN, PACKED, GAUSSIAN], ids=lambda case: case.id)
def test_drawing_again_gives_the_same(case):
    """The same case has the same numbers, to the bit."""
    assert same(drawn(case), drawn(case))


def test_another_process_draws_the_same():
    """Numbers depend on no address and no hash seed of the process."""
    code = (
        "import sys, zlib; from parity.commands.choose import find; from parity.inputs import stack_inputs;"
        "print(zlib.crc32(b''.join(a.tobytes() for a in stack_inputs(find(sys.argv[1], 'full')).values())))"
    )
    command = [sys.executable, "-c", code, GAUSSIAN.id]
    options = {"capture_output": True, "text": True}

    ran = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, **options)  # noqa: S603 - ours
        for seed in ("1", "2")
    ]

    sums = {done.stdout for done in ran}
    assert len(sums) == 1
    assert sums != {""}


@pytest.mark.parametrize(
    "change",
    [{"strategy": "fsdp1"}, {"world": 2}, {"subject": "jax"}, {"steps": 3}, {"clauses": ()}, {"link": "frameworks"}],
    ids=lambda change: next(iter(change)),
)
def test_numbers_do_not_depend_on(change):
    """What runs a case, and how, leaves its numbers alone: only then may results be compared."""
    assert same(drawn(PLAIN), drawn(dataclasses.replace(PLAIN, **change)))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"bias": True}, {"base": "nf4", "alpha": 4.0}], ids=lambda change: next(iter(change))
)
def test_numbers_depend_on(change):
    """A seed, or another layer, changes them."""
    assert not np.array_equal(drawn(PLAIN)["x"], drawn(dataclasses.replace(PLAIN, **change))["x"])


def test_arrays_are_what_their_dtype_holds():
    """A bfloat16 base and bfloat16 data are rounded before anybody sees them."""
    arrays = drawn(GAUSSIAN)

    for name in ("x", "G", "layers.0.weight"):
        assert np.array_equal(arrays[name], arrays[name].astype(ml_dtypes.bfloat16).astype(np.float32))


# lattices


@EACH_LATTICE
def test_every_lattice_is_certified(case):
    """Each lattice case of the quick tier draws numbers whose every sum fits the significand."""
    certificate = certify(case, drawn(case))

    assert certificate.units
    assert all(units <= certificate.allowed[name] for name, units in certificate.units.items())


@EACH_LATTICE
def test_certified_norms_are_exact_in_any_order(case):
    """What the certificate says of n^2 holds in float32, summed from either end."""
    arrays = drawn(case)
    for position in range(len(case.layers)):
        W, A, B = (arrays[f"layers.{position}.{name}"] for name in ("weight", "lora_A", "lora_B"))
        V = W + np.float32(case.alpha / case.rank) * (B @ A)
        squares = [
            np.cumsum(V[:, order] ** 2, axis=1, dtype=np.float32)[:, -1]
            for order in (slice(None), slice(None, None, -1))
        ]

        wide = W.astype(np.float64) + case.alpha / case.rank * (B.astype(np.float64) @ A)
        assert np.array_equal(*squares)
        assert np.array_equal(squares[0].astype(np.float64), (wide**2).sum(1))


def _huge_x(arrays):
    arrays["x"] = arrays["x"] * np.float32(2.0**24)


def _a_third(arrays):
    arrays["layers.1.weight"][0, 0] += 1 / 3


def _odd_row(arrays):
    arrays["layers.0.weight"][3] = 0
    arrays["layers.0.lora_B"][3] = 0
    arrays["layers.0.weight"][3, :3] = 1


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_huge_x, "are exact"),
        (_a_third, "layer 1 has a norm"),
        (_odd_row, "layer 0 has a norm that is no power of two"),
    ],
    ids=["too large", "a third", "norm sqrt 3"],
)
def test_what_is_not_exact_is_refused(plant, said):
    """A draw that could round is refused, and says which quantity."""
    arrays = {name: array.copy() for name, array in drawn(PLAIN).items()}
    plant(arrays)

    with pytest.raises(LatticeNotExact, match=said):
        certify(PLAIN, arrays)


def test_q6_a_block_with_another_absmax_is_refused():
    """A quantised lattice whose nested scales would not decode to themselves is refused."""
    arrays = {name: array.copy() for name, array in drawn(PACKED).items()}
    arrays["layers.0.weight"] *= 2
    arrays["layers.0.lora_B"] *= 2

    with pytest.raises(LatticeNotExact, match="absmax is not 1"):
        certify(PACKED, arrays)


def test_bfloat16_has_eight_bits():
    """A product that bfloat16 stores is held to eight bits: the dense float32 draw does not pass."""
    narrow = dataclasses.replace(PLAIN, compute="bfloat16", world=2)

    with pytest.raises(LatticeNotExact, match="256 are exact"):
        certify(narrow, drawn(PLAIN))


@pytest.mark.parametrize(("compute", "world"), [("bfloat16", 3), ("bfloat16", 6), ("float32", 9), ("float32", 13)])
def test_a_lattice_is_certified_for_some_worlds_alone(compute, world):
    """A world whose odd part is beyond what the draw was certified for is refused."""
    wide = dataclasses.replace(PLAIN, compute=compute, world=world)

    with pytest.raises(LatticeNotExact, match=f"{world} ranks multiply the cotangent"):
        certify(wide, drawn(PLAIN))


def test_d9_a_rate_whose_mask_rounds_has_no_lattice():
    """1 / (1 - p) must be a power of two, or what is kept is not exact."""
    with pytest.raises(LatticeNotExact, match="no power of two"):
        certify(dataclasses.replace(PLAIN, dropout=0.25), drawn(PLAIN))


@pytest.mark.parametrize("world", [*range(1, 17)])
def test_every_rank_has_tokens_where_there_are_enough(world):
    """A rank without a token would have an empty batch and an expectation of zeros."""
    dealt = deal_tokens(24, world)

    assert min(part.stop - part.start for part in dealt) >= 1
    assert [part.start for part in dealt[1:]] == [part.stop for part in dealt[:-1]]
    assert (dealt[0].start, dealt[-1].stop) == (0, 24)


def test_d7_a_lattice_has_a_bias_on_its_zero_rows():
    """The output of a zero row is its bias: were that 0 as well, its loss would not show."""
    case = next(case for case in LATTICES if case.zero_rows and case.bias)
    arrays = drawn(case)
    V = arrays["layers.0.weight"] + case.scaling * arrays["layers.0.lora_B"] @ arrays["layers.0.lora_A"]
    zero = ~V.any(axis=1)

    assert zero.any()
    assert arrays["layers.0.bias"][zero].all()


# dealing


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("tokens", [24, 128, 7])
def test_tokens_are_dealt_once(tokens, world):
    """Every token goes to exactly one rank, in order."""
    dealt = [token for part in deal_tokens(tokens, world) for token in range(part.start, part.stop)]

    assert dealt == list(range(tokens))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_get_unequal_shares(world):
    """S3 is tried with unequal token counts, none of them zero."""
    shares = {part.stop - part.start for part in deal_tokens(24, world)}

    assert len(shares) > 1
    assert min(shares) > 0


def test_s3_cotangents_carry_the_world():
    """FSDP's mean over ranks gives the sum over tokens: each cotangent is the world size times its rows of G."""
    whole = stack_inputs(PLAIN)["G"]

    cotangents = [parts(PLAIN, rank)[0][0][1] for rank in range(3)]

    assert np.array_equal(np.concatenate(cotangents), 3 * whole)


@pytest.mark.parametrize("step", range(3))
def test_one_rank_is_hot(step):
    """In a one-hot case every rank's cotangent but one is zero, and that one's is its own rows of G, unscaled."""
    cotangents = [parts(GAUSSIAN, rank)[step][0][1] for rank in range(3)]
    own = stack_inputs(GAUSSIAN)["G"][deal_tokens(24, 3)[step]]

    assert [bool(G.any()) for G in cotangents] == [rank == step for rank in range(3)]
    assert np.array_equal(cotangents[step], own)


def test_cold_ranks_see_tokens():
    """A cold rank runs the same forward: its x is not zero."""
    assert all(parts(GAUSSIAN, rank)[0][0][0].any() for rank in range(3))


@pytest.mark.parametrize("step", range(3))
def test_the_twin_sees_the_hot_rank(step):
    """The unsharded twin of a one-hot case runs on the hot rank's tokens, at every step."""
    (twin,) = parts(GAUSSIAN.unsharded_twin(), 0)[step]
    (hot,) = parts(GAUSSIAN, step)[step]

    assert all(np.array_equal(left, right) for left, right in zip(twin, hot, strict=True))


def test_the_twin_sees_every_token():
    """The unsharded twin of any other case runs on all tokens with G as it is."""
    (((x, G),),) = parts(PLAIN.unsharded_twin(), 0)

    assert np.array_equal(x, stack_inputs(PLAIN)["x"])
    assert np.array_equal(G, stack_inputs(PLAIN)["G"])


# what stands in two places


def test_q2_the_tied_codebook_is_the_reference_s():
    """The core's own table of NF4 is the reference's, to the bit."""
    assert NF4.tobytes() == np.asarray(NF4_CODE).tobytes()


def test_q5_ties_lie_on_midpoints():
    """Ties and their neighbours on both sides all occur, and every block has absmax 1."""
    weight = tied_weight(np.random.default_rng(0), (50, 64))

    midpoints = (NF4[1:] + NF4[:-1]) / np.float32(2)
    near = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(-9)), np.nextafter(midpoints, np.float32(9))])
    assert set(weight.ravel()) == {*near, np.float32(1)}
    assert np.all(np.abs(weight.reshape(-1, 64)).max(axis=1) == 1)


# networks


def test_adapters_of_a_network_depend_on_the_layer_alone():
    """The same layer has the same A and B under every strategy; another layer has others."""
    case = next(case for case in QUICK.values() if isinstance(case, NetworkCase))
    other = dataclasses.replace(case, strategy="fsdp1", inputs="text", world=1)

    first, again = (adapter_factors(c, "model.layers.0.mlp.up_proj", fan_in=8, fan_out=6) for c in (case, other))
    elsewhere = adapter_factors(case, "model.layers.1.mlp.up_proj", fan_in=8, fan_out=6)

    assert all(np.array_equal(left, right) for left, right in zip(first, again, strict=True))
    assert not np.array_equal(first[0], elsewhere[0])
    assert first[1].any()


def test_d6_magnitudes_leave_the_norm():
    """Starting magnitudes are the norm times a pattern, so that c is not 1 everywhere; float32 throughout."""
    got = starting_magnitude(np.full(6, 2.0))

    assert got.dtype == np.float32
    assert set(got) > {np.float32(2)}
    assert got.tolist() == (2 * np.resize(MAGNITUDE_PATTERN, 6)).tolist()


# sums that a short significand does not hold

SHORT = [case for case in LATTICES if case.compute in {"bfloat16", "float16"} and _has_loud_token(case)]


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.id)
def test_dm_alone_is_longer_than_the_compute_dtype(case):
    """G1: in the compute dtype dm's sum over tokens rounds, while dA and dB, formed by the same tokens, do not."""
    arrays = {name: value.astype(np.float64) for name, value in drawn(case).items()}
    A, B, W, x, G = (arrays[name] for name in (*(f"layers.0.{n}" for n in ("lora_A", "lora_B", "weight")), "x", "G"))
    u = x * arrays.get("layers.0.keep", 1.0) / (1.0 - case.dropout)
    sums = {"dm": (G * (u @ (W + case.scaling * B @ A).T)).sum(0), "dB": G.T @ (u @ A.T), "dA": (G @ B).T @ u}
    narrow = np.dtype(getattr(ml_dtypes, case.compute, case.compute))
    rounds = {name: bool((value.astype(narrow).astype(np.float64) != value).any()) for name, value in sums.items()}

    assert rounds == {"dm": True, "dB": False, "dA": False}


def test_a_draw_whose_dm_is_short_is_refused():
    """Without the loud token bfloat16 holds every dm: such a draw could not show where dm is summed."""
    case = SHORT[0]
    arrays = drawn(case)
    arrays["x"] = np.sign(arrays["x"])

    with pytest.raises(LatticeNotExact, match="holds every dm"):
        require_long_sums(case, arrays)
