"""Clauses S1 to S4, S6 to S8 and S11: layouts by hand and by property; gradients on shards, to the bit."""

import re
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array
from jax.sharding import PartitionSpec

from ref import dora, fsdp, layouts
from ref.types import Adapter, InputError, Layer

WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
SHARDED = pytest.mark.parametrize("world_size", [2, 3, 4])
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
MEMBERS = st.lists(SHAPES, min_size=1, max_size=6).map(lambda shapes: [(str(i), s) for i, s in enumerate(shapes)])


# S1


@pytest.mark.parametrize(
    ("dim0", "world_size", "want"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (9, 4, [(0, 3), (3, 6), (6, 9), (9, 9)]),
        (1, 3, [(0, 1), (1, 1), (1, 1)]),
    ],
    ids=["even", "short last", "empty last", "one row"],
)
def test_s1_rows(dim0: int, world_size: int, want: list[tuple[int, int]]) -> None:
    """Rows are dealt in steps of the rounded-up quotient: later ranks may hold fewer, or none."""
    held = [layouts.fsdp2_row_range(dim0, world_size=world_size, rank=rank) for rank in range(world_size)]

    assert [(rows.start, rows.stop) for rows in held] == want


@given(st.integers(0, 10**6), st.integers(1, 300))
def test_s1_rows_cover_once_in_order(dim0: int, world_size: int) -> None:
    """Every row is held by exactly one rank, and ranks hold them in order."""
    held = [layouts.fsdp2_row_range(dim0, world_size=world_size, rank=rank) for rank in range(world_size)]

    assert held[0].start == 0
    assert held[-1].stop == dim0
    assert all(before.stop == after.start for before, after in pairwise(held))


@given(st.integers(1, 10**6), st.integers(1, 300))
def test_s1_no_rank_holds_more_than_the_first(dim0: int, world_size: int) -> None:
    """The first rank holds the most rows, and no later one holds more than the one before."""
    held = [layouts.fsdp2_row_range(dim0, world_size=world_size, rank=rank) for rank in range(world_size)]
    heights = [rows.stop - rows.start for rows in held]

    assert heights == sorted(heights, reverse=True)


@pytest.mark.parametrize("rank", [-1, 2])
def test_s1_refuses_a_rank_outside_the_world(rank: int) -> None:
    """A rank that does not exist holds nothing that could be asked for."""
    with pytest.raises(InputError, match="of a world of 2"):
        layouts.fsdp2_row_range(4, world_size=2, rank=rank)


def test_s1_packed_storage_is_cut_in_mid_block() -> None:
    """A 50 x 96 weight in four bits, at world 2, is cut at element 2400: in the middle of block 37."""
    rows, _ = layouts.packed_shape(50 * 96, itemsize=1)

    start = layouts.fsdp2_row_range(rows, world_size=2, rank=1).start

    assert 2 * start / 64 == 37.5


def test_s1_packed_storage_pads_its_bytes() -> None:
    """An odd element count pads a nibble, an odd byte count a byte."""
    assert layouts.packed_shape(65 * 65, itemsize=2) == (1057, 1)


@WORLDS
def test_s1_gather_undoes_shard(world_size: int) -> None:
    """All ranks' rows, in order, are the parameter."""
    whole = jnp.arange(15.0).reshape(5, 3)

    parts = [fsdp.shard(whole, world_size=world_size, rank=rank) for rank in range(world_size)]

    assert fsdp.gather(parts).tolist() == whole.tolist()


# S2


def test_s2_without_alignment() -> None:
    """Members follow each other with nothing between, and a rank's range may cut a row."""
    layout = layouts.flat_layout([("A", (2, 3)), ("B", (5, 2)), ("m", (5,))], world_size=2)

    assert layout.size == 22
    assert layout.shard(0) == [("A", slice(0, 6)), ("B", slice(0, 5)), ("m", slice(0, 0))]
    assert layout.shard(1) == [("A", slice(6, 6)), ("B", slice(5, 10)), ("m", slice(0, 5))]


def test_s2_with_alignment() -> None:
    """Each member starts at a multiple of four float32 elements; the tail fills up to the world size."""
    layout = layouts.flat_layout([("A", (2, 3)), ("B", (5, 2)), ("m", (5,))], world_size=2, alignment=4)

    assert [member.start for member in layout.members] == [0, 8, 20]
    assert layout.size == 26
    assert layout.shard(0) == [("A", slice(0, 6)), ("B", slice(0, 5)), ("m", slice(0, 0))]
    assert layout.shard(1) == [("A", slice(6, 6)), ("B", slice(5, 10)), ("m", slice(0, 5))]


def test_s2_alignment_moves_a_cut() -> None:
    """The same members cut elsewhere once they are aligned: a layout without alignment is another layout."""
    members = [("A", (1, 5)), ("B", (9, 1))]

    plain, aligned = (layouts.flat_layout(members, world_size=2, alignment=alignment) for alignment in (None, 4))

    assert plain.shard(0)[1] == ("B", slice(0, 2))
    assert aligned.shard(0)[1] == ("B", slice(0, 1))


@given(MEMBERS, st.integers(1, 9), st.sampled_from([None, 2, 4, 8]))
def test_s2_shards_cover_once_in_order(
    members: list[tuple[str, tuple[int, ...]]], world_size: int, alignment: int | None
) -> None:
    """Every element of every member is owned by exactly one rank, and ranks own them in order."""
    layout = layouts.flat_layout(members, world_size=world_size, alignment=alignment)

    owned = {name: [] for name, _ in members}
    for rank in range(world_size):
        for name, part in layout.shard(rank):
            owned[name] += range(part.start, part.stop)

    assert owned == {member.name: list(range(member.size)) for member in layout.members}


@given(MEMBERS, st.integers(1, 9), st.sampled_from([2, 4, 8]))
def test_s2_alignment_is_kept(members: list[tuple[str, tuple[int, ...]]], world_size: int, alignment: int) -> None:
    """Every member starts at a multiple of the alignment, the whole is a multiple of the world, and no more is lost."""
    layout = layouts.flat_layout(members, world_size=world_size, alignment=alignment)
    unused = layout.size - sum(member.size for member in layout.members)

    assert [member.start % alignment for member in layout.members] == [0] * len(members)
    assert layout.size % world_size == 0
    assert unused <= (alignment - 1) * (len(members) - 1) + world_size - 1


@given(MEMBERS, st.integers(1, 9), st.sampled_from([None, 4]))
def test_s2_shards_are_slices_of_the_flat_parameter(
    members: list[tuple[str, tuple[int, ...]]], world_size: int, alignment: int | None
) -> None:
    """A rank's range of the flat parameter holds just the elements that the layout says, and filler."""
    layout = layouts.flat_layout(members, world_size=world_size, alignment=alignment)
    flat = np.full(layout.size, fsdp.FILLER, float)
    for member in layout.members:
        flat[member.start : member.start + member.size] = 100 + np.arange(member.size)

    for rank in range(world_size):
        values = flat[layout.rank_range(rank)]
        parts = [100 + np.arange(part.start, part.stop) for _, part in layout.shard(rank)]
        assert values[values != fsdp.FILLER].tolist() == np.concatenate(parts).tolist()


def test_s2_unflatten_undoes_flatten() -> None:
    """The members come back in their shapes, and what lies between them is the filler."""
    arrays = {"A": jnp.ones((1, 5)), "m": jnp.zeros(2)}
    layout = layouts.flat_layout([("A", (1, 5)), ("m", (2,))], world_size=3, alignment=4)

    flat = fsdp.flatten(arrays, layout)

    assert flat.tolist() == [1] * 5 + [fsdp.FILLER] * 3 + [0] * 2 + [fsdp.FILLER] * 2
    assert {name: x.tolist() for name, x in fsdp.unflatten(flat, layout).items()} == {"A": [[1] * 5], "m": [0] * 2}


def test_s2_a_layout_of_many_ranks_costs_no_more() -> None:
    """The last of 16,384 ranks of a 405B model's largest unit finds its part without counting ranks or elements."""
    members = [("weight", (53248, 16384)), ("lora_A", (64, 16384)), ("lora_B", (53248, 64)), ("magnitude", (53248,))]
    layout = layouts.flat_layout(members, world_size=16384, alignment=8)

    last = dict(layout.shard(16383))

    assert last["magnitude"] == slice(12012, 53248)
    assert last["weight"] == slice(53248 * 16384, 53248 * 16384)


# S3 to S7


def test_s3_reduction_is_a_mean() -> None:
    """The reduced gradient is the mean over ranks, not the sum."""
    assert fsdp.reduce_mean([jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 6.0])]).tolist() == [2, 4]


@WORLDS
def test_s4_local_norms_are_rows_of_the_norm(world_size: int) -> None:
    """Norms from a rank's own rows are the rows of the norm, to the bit on lattice inputs."""
    layer = lattice_layer(9, 16, 3)
    whole_O = dora.weight_norm(
        dora.direction(layer.weight, layer.adapter.lora_A, layer.adapter.lora_B, scaling=layer.scaling)
    )
    rows = partial(fsdp.shard, world_size=world_size)

    local = [
        fsdp.local_weight_norm(
            rows(layer.weight, rank=rank),
            layer.adapter.lora_A,
            rows(layer.adapter.lora_B, rank=rank),
            scaling=layer.scaling,
        )
        for rank in range(world_size)
    ]
    assert fsdp.gather(local).tolist() == whole_O.tolist()


@pytest.mark.parametrize(
    ("storage", "param_dtype"), [("bfloat16", None), ("bfloat16", "bfloat16"), ("uint8", "float16"), ("uint8", None)]
)
def test_s6_packed_bytes_travel_as_stored(storage: str, param_dtype: str | None) -> None:
    """Packed bytes keep their dtype on the wire."""
    assert layouts.wire_dtype(storage, param_dtype=param_dtype) == storage


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
def test_s6_a_cast_of_packed_bytes_is_refused(param_dtype: str) -> None:
    """A mixed-precision dtype that would cast packed bytes is refused."""
    with pytest.raises(InputError, match="would cast packed bytes"):
        layouts.wire_dtype("bfloat16", param_dtype=param_dtype)


ADAPTER_UNIT = [layouts.UnitMember(name, "float32", trainable=True) for name in ("lora_A", "lora_B", "magnitude")]
FROZEN_FLOAT = layouts.UnitMember("weight", "float32", trainable=False)
FROZEN_BYTES = layouts.UnitMember("weight", "uint8", trainable=False)
NARROW = layouts.UnitMember("magnitude", "bfloat16", trainable=True)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s7_adapter_unit_is_uniform(strategy: layouts.Strategy) -> None:
    """A float32 adapter is a unit under every strategy."""
    layouts.check_unit(ADAPTER_UNIT, strategy=strategy)


@pytest.mark.parametrize(
    ("members", "strategy", "message"),
    [
        ([*ADAPTER_UNIT, FROZEN_FLOAT], "fsdp1", "mixes trainable and frozen"),
        ([*ADAPTER_UNIT, FROZEN_BYTES], "fsdp1-orig", "mixes dtypes float32, uint8"),
        ([FROZEN_BYTES], "fsdp1", "weight has an integer dtype"),
        ([*ADAPTER_UNIT[:2], NARROW], "fsdp2", "mixes dtypes bfloat16, float32"),
    ],
    ids=["requires_grad", "dtype", "integer", "fsdp2 dtype"],
)
def test_s7_mixed_unit_is_refused(members: list[layouts.UnitMember], strategy: layouts.Strategy, message: str) -> None:
    """A unit that the strategy cannot hold is refused, with its reason."""
    with pytest.raises(InputError, match=message):
        layouts.check_unit(members, strategy=strategy)


@pytest.mark.parametrize(
    ("member", "strategy"), [(FROZEN_FLOAT, "fsdp1-orig"), (FROZEN_BYTES, "fsdp2")], ids=["fsdp1-orig", "fsdp2"]
)
def test_s7_what_each_strategy_does_hold(member: layouts.UnitMember, strategy: layouts.Strategy) -> None:
    """A frozen weight beside the adapter is well under `use_orig_params`, packed bytes under FSDP2."""
    layouts.check_unit([*ADAPTER_UNIT, member], strategy=strategy)


BASE = layouts.UnitMember("weight", "float32", trainable=False, castable=True)
BIAS = layouts.UnitMember("bias", "float32", trainable=False)


@pytest.mark.parametrize("param_dtype", [None, "float32"])
def test_s7_a_block_is_one_unit(param_dtype: str | None) -> None:
    """Nothing is to be cast: base, bytes, bias and adapter are gathered together."""
    block = [BASE, FROZEN_BYTES, BIAS, *ADAPTER_UNIT]
    assert layouts.block_units(block, strategy="fsdp2", param_dtype=param_dtype) == [block]


def test_s7_what_is_cast_is_a_unit_apart() -> None:
    """A unit has one `param_dtype`: adapters, bytes and biases keep theirs (D11, S6)."""
    block = [BASE, FROZEN_BYTES, BIAS, *ADAPTER_UNIT]
    units = layouts.block_units(block, strategy="fsdp2", param_dtype="bfloat16")
    assert units == [[BASE], [FROZEN_BYTES, BIAS, *ADAPTER_UNIT]]


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig"])
def test_s7_a_flat_parameter_of_a_block_is_frozen_or_trains_and_has_one_dtype(strategy: layouts.Strategy) -> None:
    """The adapter's gradients are then all there are, whether or not a flat parameter could be mixed."""
    half = layouts.UnitMember("norm", "bfloat16", trainable=False)
    units = layouts.block_units([*ADAPTER_UNIT, BASE, half, BIAS], strategy=strategy, param_dtype=None)
    assert units == [[half], [BASE, BIAS], ADAPTER_UNIT]
    for unit in units:
        layouts.check_unit(unit, strategy=strategy)


# The forward and backward on shards


def lattice_layer(out: int, width: int, rank: int, *, dtype: type = np.float32, bias: bool = True) -> Layer:
    """Rows of V with four entries of size 1, so that every norm is 2; everything else small integers."""
    random = np.random.default_rng([out, width, rank])
    V_OI = np.zeros((out, width))
    for row in V_OI:
        row[random.permutation(width)[:4]] = random.choice([-1, 1], 4)
    A_RI, B_OR = random.choice([-1, 1], (rank, width)), random.choice([-1, 1], (out, rank))
    m_O, b_O = random.choice([1, 2, 4], out), random.integers(-2, 3, out)
    W_OI, A_RI, B_OR, m_O, b_O = (jnp.asarray(x.astype(dtype)) for x in (V_OI - B_OR @ A_RI / 2, A_RI, B_OR, m_O, b_O))
    return Layer(W_OI, Adapter(A_RI, B_OR, m_O), b_O if bias else None, scaling=0.5)


STACKS = {
    "one layer": [lattice_layer(8, 6, 4)],
    "uneven rows": [lattice_layer(9, 6, 3)],
    "rank below world": [lattice_layer(7, 6, 1)],
    "one output": [lattice_layer(1, 6, 2, bias=False)],
    "stacked": [lattice_layer(9, 6, 3), lattice_layer(5, 9, 2, bias=False)],
    "float64": [lattice_layer(7, 6, 2, dtype=np.float64)],
}


def batches(layers: list[Layer], world_size: int) -> tuple[Array, Array]:
    """Small integer inputs and cotangents, four tokens a rank."""
    random = np.random.default_rng(world_size)
    shapes = [(world_size, 4, layers[0].weight.shape[1]), (world_size, 4, layers[-1].weight.shape[0])]
    return tuple(jnp.asarray(random.integers(-2, 3, shape), layers[0].weight.dtype) for shape in shapes)


@jax.jit
def unsharded(layers: list[Layer], x_NTI: Array, G_NTO: Array) -> tuple[Array, list[Adapter]]:
    """One device, one batch, the sum over all tokens."""

    def outputs(adapters: list[Adapter]) -> Array:
        adapted = [replace(layer, adapter=adapter) for layer, adapter in zip(layers, adapters, strict=True)]
        return fsdp.stack(x_NTI.reshape(-1, x_NTI.shape[2]), adapted, relu=True)

    y_TO, pull_back = jax.vjp(outputs, [layer.adapter for layer in layers])
    return y_TO.reshape(G_NTO.shape), pull_back(G_NTO.reshape(y_TO.shape))[0]


@cache
def both(stack: str, world_size: int) -> tuple[tuple, tuple]:
    """The unsharded result and the sharded one, in which the cotangent is scaled by the world size."""
    layers = STACKS[stack]
    x_NTI, G_NTO = batches(layers, world_size)
    return (
        unsharded(layers, x_NTI, G_NTO),
        fsdp.sharded_gradients(x_NTI, layers, G_NTO=world_size * G_NTO, relu=True),
    )


@SHARDED
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("field", ["lora_A", "lora_B", "magnitude"])
def test_s3_shards_equal_slices_of_the_unsharded_gradient(stack: str, world_size: int, field: str) -> None:
    """On lattice inputs each rank's rows of each gradient are those of the unsharded gradient, to the bit."""
    (_, want), (_, got) = both(stack, world_size)

    for rank, held in enumerate(got):
        for whole, part in zip(want, held, strict=True):
            rows = fsdp.shard(getattr(whole, field), world_size=world_size, rank=rank)
            assert getattr(part, field).tolist() == rows.tolist()
    assert any(bool(jnp.any(getattr(whole, field) != 0)) for whole in want)


@SHARDED
@pytest.mark.parametrize("stack", STACKS)
def test_s4_sharded_output_equals_the_unsharded_one(stack: str, world_size: int) -> None:
    """On lattice inputs every rank's output is that of the unsharded stack, to the bit."""
    (want_NTO, _), (got_NTO, _) = both(stack, world_size)

    assert got_NTO.tolist() == want_NTO.tolist()


@pytest.mark.parametrize("hot", [0, 1, 2])
def test_s3_one_hot_rank(hot: int) -> None:
    """When one rank alone has a cotangent, the gradient is that rank's over the world size: a mean, not a choice."""
    layers = STACKS["uneven rows"]
    x_NTI, G_NTO = batches(layers, 3)
    G_hot_NTO = jnp.zeros_like(G_NTO).at[hot].set(3 * G_NTO[hot])

    _, got = fsdp.sharded_gradients(x_NTI, layers, G_NTO=G_hot_NTO)

    _, (want,) = unsharded(layers, x_NTI[hot : hot + 1], G_NTO[hot : hot + 1])
    assert fsdp.gather([held[0].magnitude for held in got]).tolist() == want.magnitude.tolist()


def test_s8_each_unit_gathers_in_its_own_forward() -> None:
    """A layer gathers W, b, A, B, m and n forward, all but b again backward, and scatters three gradients."""
    layers = STACKS["one layer"]
    x_NTI, G_NTO = batches(layers, 2)
    heights = tuple(layer.adapter.lora_B.shape for layer in layers)

    program = partial(fsdp._on_mesh, mesh=fsdp._mesh(2), heights=heights, relu=False)
    text = str(jax.make_jaxpr(program)(x_NTI, G_NTO, layers))

    assert len(re.findall(r"= all_gather\[", text)) == 6 + 5
    assert len(re.findall(r"= reduce_scatter\[", text)) == 3


def test_s11_a_gather_reduces_its_gradient_to_the_mean() -> None:
    """What comes back through a gather is the mean over ranks of the cotangents, cut into shards."""
    parameter = jnp.asarray([1.0, 2.0, 3.0, 0.0])  # three rows and one of padding
    cotangent_NO = jnp.asarray([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])

    def pulled(held_d: Array, cotangent_1O: Array) -> Array:
        _, pull_back = jax.vjp(lambda held_d: fsdp.gather_rows(held_d, 3), held_d)
        return pull_back(cotangent_1O[0])[0]

    split = PartitionSpec(fsdp.AXIS)
    on_mesh = jax.shard_map(pulled, mesh=fsdp._mesh(2), in_specs=(split, split), out_specs=split)
    assert jax.jit(on_mesh)(parameter, cotangent_NO).tolist() == [5.5, 11.0, 16.5, 0.0]


def test_a_world_without_devices_is_refused() -> None:
    """More ranks than devices is refused, with the setting that mends it."""
    layers = STACKS["one layer"]
    x_NTI, G_NTO = batches(layers, 9)

    with pytest.raises(InputError, match="jax_num_cpu_devices"):
        fsdp.sharded_gradients(x_NTI, layers, G_NTO=G_NTO)
