"""A check passes at its limit and fails just beyond, never on NaN, and says where it could not have failed."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from parity.checks.shard_check import Expected, check_shard
from parity.shard import Shard, whole_index

LIMIT = 0.125
BEYOND = float(np.nextafter(LIMIT, 1.0))


def shard(array, *, shape=None, index=None, kind="gradient"):
    """A shard that is the whole tensor, unless it is said otherwise."""
    array = np.asarray(array)
    shape = array.shape if shape is None else shape
    where = whole_index(shape) if index is None else index
    return Shard(name="layers.0.lora_A", kind=kind, step=1, global_shape=shape, index=where, array=array, rank=3)


def check(got, want, mode, limit=None, **more):
    """Compare whole tensors."""
    return check_shard(shard(got), Expected(value=np.asarray(want), mode=mode, limit=limit, **more))


# at the limit, and beyond

VALUES = np.array([1.0, -2.0, 3.0])


@pytest.mark.parametrize("mode", ["bitwise", "bits"])
def test_equal_values_pass(mode):
    """Equality holds between equal arrays."""
    done = check(VALUES.copy(), VALUES, mode)

    assert (done.passed, done.worst, done.ratio) == (True, 0.0, 0.0)


@pytest.mark.parametrize("mode", ["bitwise", "bits"])
def test_one_ulp_off_fails_equality(mode):
    """Equality fails at the next representable number."""
    done = check(np.nextafter(VALUES, 9.0), VALUES, mode)

    assert not done.passed
    assert done.ratio is None


def test_bound_passes_at_its_limit():
    """An error equal to the limit is within it."""
    done = check(VALUES + LIMIT, VALUES, "bound", np.full(3, LIMIT))

    assert (done.passed, done.worst, done.limit, done.ratio) == (True, LIMIT, LIMIT, 1.0)


def test_bound_fails_just_beyond_its_limit():
    """One element beyond its own limit fails, however wide the others' limits are."""
    done = check(VALUES + LIMIT, VALUES, "bound", np.array([1.0, np.nextafter(LIMIT, 0), 1.0]))

    assert not done.passed
    assert done.evidence.at == (1,)


def test_a_limit_of_zero_wants_equality():
    """Where the limit is 0, any difference fails and none passes."""
    assert check(VALUES, VALUES, "bound", np.zeros(3)).passed
    assert not check(np.nextafter(VALUES, 9.0), VALUES, "bound", np.zeros(3)).passed


def test_norm_passes_at_its_limit():
    """The 2-norm of the difference may equal the limit: 3, 4 and 5."""
    done = check(VALUES + np.array([3.0, 4.0, 0.0]), VALUES, "norm", 5.0)

    assert (done.passed, done.worst, done.ratio) == (True, 5.0, 1.0)


def test_norm_fails_just_beyond_its_limit():
    """A difference whose 2-norm is beyond the limit fails, though each element lies below it."""
    done = check(VALUES + np.array([3.0, 4.0, 0.0]), VALUES, "norm", float(np.nextafter(5.0, 0)))

    assert not done.passed
    assert done.evidence.at == (1,)


ULPS = np.array([1.0, -1.5, 0.75], np.float32)


@pytest.mark.parametrize(("units", "passed"), [(1, True), (2, False)])
def test_ulps_are_counted_in_float32(units, passed):
    """One unit in the last place of the wanted float32 is within a limit of one, two are not, whatever the binade."""
    got = ULPS.copy()
    for _ in range(units):
        got = np.nextafter(got, np.float32(9) * np.sign(ULPS))

    done = check(got, ULPS.astype(np.float64), "ulp", 1.0)

    assert (done.passed, done.ratio) == (passed, float(units))


# zero and NaN

ZEROS = [np.array([0.0, 1.0]), np.array([-0.0, 1.0])]


@pytest.mark.parametrize("mode", ["bitwise", "bound"])
def test_the_sign_of_zero_is_ignored(mode):
    """-0 equals 0 in gradients and in what follows from them."""
    assert check(ZEROS[1], ZEROS[0], mode, np.zeros(2)).passed


def test_bits_sees_the_sign_of_zero():
    """-0 is not 0 where every bit counts."""
    done = check(ZEROS[1], ZEROS[0], "bits")

    assert not done.passed
    assert done.evidence.at == (0,)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16], ids=["uint8", "float32", "bfloat16"])
def test_bits_sees_the_last_bit(dtype):
    """One bit of any dtype is seen."""
    want = np.array([3, 5], dtype)
    got = want.copy()
    got.view(np.uint8)[-got.itemsize] ^= 1

    assert not check(got, want, "bits").passed


@pytest.mark.parametrize(
    ("mode", "limit"),
    [("bitwise", None), ("bound", np.full(3, np.inf)), ("norm", np.inf), ("ulp", np.inf)],
    ids=["bitwise", "bound", "norm", "ulp"],
)
@pytest.mark.parametrize("side", ["got", "both"])
def test_nan_never_passes(mode, limit, side):
    """A NaN fails, under an infinite limit and beside another NaN too."""
    poisoned = np.array([1.0, np.nan, 3.0])
    want = VALUES if side == "got" else poisoned

    assert not check(poisoned, want, mode, limit).passed


@pytest.mark.parametrize("limit", [np.full(3, np.nan), np.array([np.nan, 1.0, 1.0])], ids=["all", "one"])
def test_a_limit_that_is_no_number_never_passes(limit):
    """A NaN among the limits fails a difference."""
    assert not check(VALUES + LIMIT, VALUES, "bound", limit).passed


@pytest.mark.parametrize(("mode", "limit"), [("bound", np.full(3, np.inf)), ("norm", np.inf)], ids=["bound", "norm"])
def test_overflow_never_passes(mode, limit):
    """An infinity fails, under an infinite limit too."""
    assert not check(np.array([1.0, np.inf, 3.0]), VALUES, mode, limit).passed


# evidence


def test_evidence_is_the_worst_element():
    """The element furthest beyond its limit is shown, with what came and what was wanted."""
    got = VALUES + np.array([0.5, 0.25, 0.0])

    done = check(got, VALUES, "bound", np.array([0.25, 0.0625, 1.0]))

    assert dataclasses.astuple(done.evidence) == ((1,), -1.75, -2.0)
    assert (done.worst, done.limit, done.ratio) == (0.25, 0.0625, 4.0)


def test_bitwise_evidence_is_the_largest_difference():
    """Of several unequal elements the one furthest off is shown."""
    done = check(VALUES + np.array([0.5, 0.0, -4.0]), VALUES, "bitwise")

    assert dataclasses.astuple(done.evidence) == ((2,), -1.0, 3.0)
    assert done.worst == 4.0


def test_a_passed_check_keeps_no_arrays():
    """Arrays are kept for the diagnosis of failures alone."""
    done = check(VALUES, VALUES, "bitwise")

    assert (done.got, done.want, done.evidence) == (None, None, None)


def test_a_check_says_whose_it_is():
    """Tensor, kind, step, rank and index are the shard's."""
    done = check(VALUES, VALUES, "bitwise")

    assert (done.tensor, done.kind, done.step, done.rank) == ("layers.0.lora_A", "gradient", 1, 3)
    assert done.index == (slice(0, 3),)


# places


def test_a_shard_is_compared_with_its_slice():
    """Rows 1 and 2 are compared with rows 1 and 2."""
    whole = np.arange(12.0).reshape(4, 3)
    part = shard(whole[1:3], shape=(4, 3), index=(slice(1, 3), slice(0, 3)))

    assert check_shard(part, Expected(value=whole, mode="bitwise")).passed


def test_a_flat_shard_is_compared_with_its_slice():
    """One slice into a matrix counts in its row-major flattening, and may cut a row."""
    whole = np.arange(12.0).reshape(4, 3)
    part = shard(whole.reshape(-1)[4:8], shape=(4, 3), index=(slice(4, 8),))

    assert check_shard(part, Expected(value=whole, mode="bitwise")).passed


def test_limits_are_sliced_as_the_shard_is():
    """Row 1's error is held to row 1's limit."""
    limits = np.array([[1.0], [0.0]]) * np.ones((2, 2))
    whole = np.ones((2, 2))
    part = shard(whole[1:] + LIMIT, shape=(2, 2), index=(slice(1, 2), slice(0, 2)))

    assert not check_shard(part, Expected(value=whole, mode="bound", limit=limits)).passed


@pytest.mark.parametrize(
    ("index", "shape", "said"),
    [
        ((slice(3, 6),), (4,), "3:6 is outside 0:4"),
        ((slice(-1, 2),), (4,), "-1:2 is outside 0:4"),
        ((slice(3, 1),), (4,), "3:1 is outside 0:4"),
        ((slice(0, 2), slice(0, 1), slice(0, 1)), (4,), "3 slices for 1 dims"),
        ((slice(0, 3),), (4,), "shape (2,)"),
        ((slice(0, 2),), (5,), "of (5,), wanted"),
    ],
    ids=["beyond", "negative", "backwards", "too many", "not its size", "other whole"],
)
def test_a_shard_that_fits_nowhere_fails(index, shape, said):
    """An index or a shape that does not fit is a failed check that says so, not an exception."""
    done = check_shard(shard(np.ones(2), shape=shape, index=index), Expected(value=np.ones(4), mode="bitwise"))

    assert not done.passed
    assert said in done.fault


# what could not have failed


def test_an_empty_shard_is_vacuous():
    """A shard without elements shows nothing."""
    empty = shard(np.ones((0, 3)), shape=(4, 3), index=(slice(4, 4), slice(0, 3)))

    done = check_shard(empty, Expected(value=np.ones((4, 3)), mode="bitwise"))

    assert (done.passed, done.vacuous) == (True, "empty shard")


def test_an_all_zero_expectation_is_vacuous():
    """Zeros are what an implementation that does nothing gives."""
    assert check(np.zeros(3), np.zeros(3), "bitwise").vacuous == "all-zero expectation"


@pytest.mark.parametrize(
    ("limit", "said"),
    [(0.5, ""), (1.0, "zeroed would pass"), (np.inf, "zeroed would pass")],
    ids=["half", "the value", "infinite"],
)
def test_a_bound_that_lets_the_zeroed_tensor_pass_is_vacuous(limit, said):
    """A limit as large as the values themselves shows nothing."""
    assert check(np.ones(3), np.ones(3), "bound", np.full(3, limit)).vacuous == said


def test_a_norm_limit_that_lets_the_doubled_tensor_pass_is_vacuous():
    """A limit on the 2-norm is tried in the same way."""
    assert check(VALUES, VALUES, "norm", np.inf).vacuous != ""
    assert check(VALUES, VALUES, "norm", 1.0).vacuous == ""


def test_a_bound_that_lets_the_nearest_bug_pass_is_vacuous():
    """A limit that hides the numerically nearest known bug is no check of it."""
    bug = {"NormNotDetached": VALUES * 1.01}

    assert check(VALUES, VALUES, "bound", np.full(3, 0.05), mutants=bug).vacuous == "NormNotDetached would pass"
    assert check(VALUES, VALUES, "bound", np.full(3, 0.001), mutants=bug).vacuous == ""


@pytest.mark.parametrize(("limit", "said"), [(0.005, ""), (0.5, "an error of 0.01 would pass")])
def test_an_error_that_is_too_coarse_to_miss_makes_a_check_vacuous(limit, said):
    """A limit that hides the uniform error which the case must see is no check."""
    assert check(VALUES, VALUES, "bound", np.full(3, limit), coarsest=0.01).vacuous == said


@pytest.mark.parametrize(
    ("mode", "limit", "scale"),
    [
        ("bound", np.array([0.5, 0.5, 0.5]), 0.5 / 3),
        ("norm", 0.5, 0.5 / np.linalg.norm([1.0, 2.0, 3.0])),
        ("bitwise", None, np.finfo(np.float64).eps),
        ("bits", None, None),
    ],
)
def test_the_scale_that_a_check_detects(mode, limit, scale):
    """It is the smallest e at which (1 + e) times the tensor fails."""
    three = np.array([1.0, 2.0, 3.0])

    assert check(three, three, mode, limit).detects == scale


def test_an_error_of_the_detected_scale_fails():
    """Just beyond the scale that a check says it detects, the tensor times 1 + e does not pass."""
    limits = np.array([0.25, 0.5, 0.125])
    scale = check(VALUES, VALUES, "bound", limits).detects

    assert check(VALUES * (1 + 0.99 * scale), VALUES, "bound", limits).passed
    assert not check(VALUES * (1 + 1.01 * scale), VALUES, "bound", limits).passed


def test_d11_equal_values_in_a_narrower_dtype_fail():
    """A magnitude held in bfloat16 fails also where its values can be held in it."""
    got = np.ones(3, ml_dtypes.bfloat16)
    done = check(got, np.ones(3, np.float32), "bitwise", dtype="float32")

    assert (done.passed, done.fault) == (False, "dtype bfloat16, wanted float32")


def test_what_repeats_is_checked_and_not_counted():
    """A tensor that another check has shown already still fails where it is wrong."""
    done = check(VALUES, VALUES, "bitwise", repeats="the first gradient")

    assert (done.passed, done.vacuous) == (True, "repeats the first gradient")
    assert not check(VALUES + 1, VALUES, "bitwise", repeats="the first gradient").passed


def test_a_bug_that_changes_nothing_here_makes_nothing_vacuous():
    """A mutant that gives the right values, as of the last layer's dm, is no fault of this tensor."""
    same = {"NormNotDetached": VALUES * (1 + 1e-15)}

    assert check(VALUES, VALUES, "bound", np.full(3, 0.05), mutants=same).vacuous == ""


def test_a_bug_is_tried_on_the_shard_alone():
    """A bug that hurts other rows does not make this row's check count."""
    whole = np.ones((2, 2))
    bug = whole + np.array([[0.0], [0.01]])
    limits = np.full((2, 2), 0.05)
    rows = [shard(whole[k : k + 1], shape=(2, 2), index=(slice(k, k + 1), slice(0, 2))) for k in range(2)]
    expected = Expected(value=whole, mode="bound", limit=limits, mutants={"Bug": bug})

    assert [check_shard(row, expected).vacuous for row in rows] == ["", "Bug would pass"]


def test_a_tensor_without_a_claim_is_vacuous():
    """Where the oracle claims nothing, whatever finite values come pass and are not counted."""
    done = check(VALUES + 100, VALUES, "norm", 0.0, no_claim="rounding moves it by half")

    assert (done.passed, done.vacuous) == (True, "no claim: rounding moves it by half")


@pytest.mark.parametrize("odd", [np.nan, np.inf], ids=["nan", "infinity"])
def test_what_is_not_finite_fails_without_a_claim_too(odd):
    """Even where nothing is claimed, NaN and infinity are wrong."""
    assert not check(np.array([1.0, odd, 3.0]), VALUES, "norm", 0.0, no_claim="rounding moves it by half").passed
