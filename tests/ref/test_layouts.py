"""Clauses S1, S2 and S7 for whole models: by hand, by property, 405B on 16,384 ranks, and element by element by torch.

The witness is torch's own FSDP around transformers' Llama with this project's adapters, in real gloo groups of 1 to 8
ranks: no fake process group. Every element is numbered before sharding, so what a rank holds says what its range is.
It runs in processes of its own, where this file is the program (`python test_layouts.py FILE` writes its answers).

How long all ranks' parts of all parameters of the 405B tree take is not asserted: about one second.
"""

import json
import math
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.layouts import Strategy, fsdp2_row_range, row_layout
from ref.model_layouts import Unit, model_layout
from ref.types import InputError

STRATEGIES: list[Strategy] = ["fsdp1", "fsdp1-orig", "fsdp2"]
EACH = pytest.mark.parametrize("strategy", STRATEGIES)
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
MEMBERS = st.lists(SHAPES, min_size=1, max_size=4)


def llama_units(
    *, blocks: int, width: int, inner: int, queries: int, keys: int, vocabulary: int, rank: int, itemsize: int
) -> list[Unit]:
    """S7: the units of a Llama with DoRA on every linear layer of its blocks; adapters are in float32 (D11)."""
    linears = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width)}
    linears |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries)}
    linears |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    units = []
    for block, (linear, (out, into)) in product([f"model.layers.{i}" for i in range(blocks)], linears.items()):
        layer = f"{block}.{linear}"
        adapter = {"lora_A": (rank, into), "lora_B": (out, rank), "magnitude": (out,)}
        units.append(Unit(f"{layer}.base", ((f"{layer}.base.weight", (out, into)),), itemsize))
        units.append(Unit(layer, tuple((f"{layer}.{leaf}", shape) for leaf, shape in adapter.items()), itemsize=4))
    for block in (f"model.layers.{i}" for i in range(blocks)):
        norms = ("input_layernorm", "post_attention_layernorm")
        units.append(Unit(block, tuple((f"{block}.{norm}.weight", (width,)) for norm in norms), itemsize))
    rest = {"model.embed_tokens": (vocabulary, width), "model.norm": (width,), "lm_head": (vocabulary, width)}
    return [*units, Unit("", tuple((f"{name}.weight", shape) for name, shape in rest.items()), itemsize)]


# By hand and by property


PAIR = [Unit("base", (("W", (5, 3)),), itemsize=4), Unit("adapter", (("A", (1, 3)), ("B", (5, 1))), itemsize=4)]
HELD = {
    "fsdp1": [{"W": (0, 8), "A": (0, 3), "B": (0, 1)}, {"W": (8, 15), "A": (3, 3), "B": (1, 5)}],
    "fsdp1-orig": [{"W": (0, 8), "A": (0, 3), "B": (0, 1)}, {"W": (8, 15), "A": (3, 3), "B": (1, 5)}],
    "fsdp2": [{"W": (0, 9), "A": (0, 3), "B": (0, 3)}, {"W": (9, 15), "A": (3, 3), "B": (3, 5)}],
}


@EACH
def test_s1_s2_two_units_on_two_ranks(strategy: Strategy) -> None:
    """Each unit is cut by itself: FSDP1 cuts anywhere, FSDP2 between rows."""
    layout = model_layout(PAIR, strategy=strategy, world_size=2)

    held = [layout.shard(rank) for rank in range(2)]
    assert [{name: (part.start, part.stop) for name, part in parts.items()} for parts in held] == HELD[strategy]


@pytest.mark.parametrize(
    ("strategy", "want"), [("fsdp1", [16, 8]), ("fsdp1-orig", [16, 10]), ("fsdp2", [18, 12])], ids=STRATEGIES
)
def test_s1_s2_what_all_ranks_hold_is_padded(strategy: Strategy, want: list[int]) -> None:
    """A flat parameter is padded to equal parts, and before that between members; FSDP2 pads rows of each parameter."""
    layout = model_layout(PAIR, strategy=strategy, world_size=2)

    assert [sum(flat.size for flat in flats) for flats in layout.units.values()] == want


@EACH
@given(shapes=st.lists(MEMBERS, min_size=1, max_size=4), world_size=st.integers(1, 9))
def test_s1_s2_what_is_said_of_all_ranks_is_said_of_each(strategy: Strategy, shapes: list, world_size: int) -> None:
    """One rank's parts, asked for alone, lie between its cuts, and their lengths are what the rank holds."""
    names = [tuple((f"{unit}.{i}", shape) for i, shape in enumerate(members)) for unit, members in enumerate(shapes)]
    units = [Unit(str(unit), members, itemsize=4) for unit, members in enumerate(names)]
    layout = model_layout(units, strategy=strategy, world_size=world_size)

    cuts, held = dict(layout.cuts()), layout.held().tolist()

    for rank in range(world_size):
        assert layout.shard(rank) == {name: slice(*ends[rank : rank + 2].tolist()) for name, ends in cuts.items()}
        assert held[rank] == sum(part.stop - part.start for part in layout.shard(rank).values())


@given(st.integers(0, 99), st.integers(1, 12))
def test_s1_a_row_layout_cuts_at_the_rows(dim0: int, world_size: int) -> None:
    """A parameter's elements on a rank are those of the rows that the rank holds."""
    layout = row_layout("W", (dim0, 2, 3), world_size=world_size)

    for rank in range(world_size):
        rows = fsdp2_row_range(dim0, world_size=world_size, rank=rank)
        assert layout.shard(rank) == [("W", slice(rows.start * 6, rows.stop * 6))]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([PAIR[0], Unit("again", PAIR[0].members, itemsize=4)], "parameter 'W' is there twice"),
        ([PAIR[0], Unit("base", (("V", (1,)),), itemsize=4)], "unit 'base' is there twice"),
        ([Unit("base", (("scale", ()),), itemsize=4)], "scale has no dimension"),
    ],
    ids=["parameter", "unit", "scalar"],
)
@EACH
def test_s7_refuses_what_no_unit_could_hold(strategy: Strategy, units: list[Unit], message: str) -> None:
    """What would overwrite another answer, or has no rows to cut, is refused."""
    with pytest.raises(InputError, match=message):
        model_layout(units, strategy=strategy, world_size=2)


# 405B on 16,384 ranks


RANKS = 16384
SHAPE_405B = {"width": 16384, "inner": 53248, "queries": 16384, "keys": 1024, "vocabulary": 128256, "rank": 16}
UNITS_405B = llama_units(blocks=126, **SHAPE_405B, itemsize=2)
SIZES_405B = {name: math.prod(shape) for unit in UNITS_405B for name, shape in unit.members}


def test_s7_405b_is_whole() -> None:
    """Without its adapters the tree has the 405,853,388,800 parameters that the model is published with."""
    adapters = ("lora_A", "lora_B", "magnitude")

    assert sum(size for name, size in SIZES_405B.items() if not name.endswith(adapters)) == 405_853_388_800


@EACH
def test_s1_s2_405b_is_held_once(strategy: Strategy) -> None:
    """All ranks' parts of a parameter begin at its start, go on where the rank before ended, and end at its end."""
    layout = model_layout(UNITS_405B, strategy=strategy, world_size=RANKS)

    wrong = [
        name
        for name, ends in layout.cuts()
        if len(ends) != RANKS + 1 or (ends[0], ends[-1]) != (0, SIZES_405B[name]) or (np.diff(ends) < 0).any()
    ]
    assert wrong == []
    assert [name for name, _ in layout.cuts()] == list(SIZES_405B)


@EACH
def test_s1_s2_405b_ranks_hold_the_whole_and_no_more_than_a_share(strategy: Strategy) -> None:
    """The ranks' totals are the model, and none exceeds its equal part of what is padded."""
    layout = model_layout(UNITS_405B, strategy=strategy, world_size=RANKS)

    held = layout.held()

    assert held.sum() == sum(SIZES_405B.values())
    assert held.max() * RANKS <= sum(flat.size for flats in layout.units.values() for flat in flats)


@EACH
@pytest.mark.parametrize("rank", [0, 13311, RANKS - 1])
def test_s1_s2_405b_one_rank_is_one_of_all(strategy: Strategy, rank: int) -> None:
    """One rank's parts, asked for alone, are those between its cuts."""
    layout = model_layout(UNITS_405B, strategy=strategy, world_size=RANKS)

    between = {name: slice(*ends[rank : rank + 2].tolist()) for name, ends in layout.cuts()}

    assert layout.shard(rank) == between


@pytest.mark.parametrize(
    ("name", "holders"),
    [("self_attn.k_proj.lora_B", 1024), ("mlp.up_proj.lora_A", 16), ("mlp.up_proj.base.weight", 13312)],
    ids=["few rows", "rank", "four rows each"],
)
def test_s1_405b_later_ranks_hold_nothing(name: str, holders: int) -> None:
    """Where rows run out before ranks do, the first ranks hold them all."""
    layout = model_layout(UNITS_405B, strategy="fsdp2", world_size=RANKS)

    held = np.diff(dict(layout.cuts())[f"model.layers.125.{name}"])

    assert np.flatnonzero(held).tolist() == list(range(holders))


@EACH
def test_s1_s2_405b_fits_in_a_gigabyte(strategy: Strategy) -> None:
    """Every rank's part of every parameter, all kept at once, takes less than 1 GB."""
    tracemalloc.start()
    try:
        kept = dict(model_layout(UNITS_405B, strategy=strategy, world_size=RANKS).cuts())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(kept) == len(SIZES_405B)
    assert sum(ends.nbytes for ends in kept.values()) <= peak < 10**9


# Against torch


SMALL = {"blocks": 2, "width": 9, "inner": 11, "queries": 6, "keys": 2, "vocabulary": 13}
"""Most sizes are odd, and `keys` is fewer rows than most worlds have ranks."""
KINDS = {"one row": (1, None), "bf16 wire": (4, "bfloat16")}
"""The adapter's rank, of which 4 leaves nothing to align in adapters, and the dtype in which all else is gathered."""
FIRST = 100
"""The number of the first element: torch fills with 42 and 0."""
MARKS = [pytest.mark.distributed, pytest.mark.timeout(300)]
WITNESSED = pytest.mark.parametrize(
    ("world", "kind", "strategy"),
    [pytest.param(*of, id="-".join(map(str, of)), marks=MARKS) for of in product(range(1, 9), KINDS, STRATEGIES)],
)


def small_units(kind: str) -> list[Unit]:
    """The units of the model that torch shards."""
    rank, wire = KINDS[kind]
    return llama_units(**SMALL, rank=rank, itemsize=4 if wire is None else 2)


def numbered(kind: str) -> dict[str, np.ndarray]:
    """Every parameter, with numbers that no other element has."""
    numbers, end = {}, FIRST
    for name, shape in chain.from_iterable(unit.members for unit in small_units(kind)):
        start, end = end, end + math.prod(shape)
        numbers[name] = np.arange(start, end, dtype=np.float32).reshape(shape)
    return numbers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What every rank of every world holds: by unit, a flat parameter after another, padding included."""
    file = tmp_path_factory.mktemp("torch") / "held.json"
    subprocess.run([sys.executable, __file__, file], check=True, timeout=280)  # noqa: S603 - this file
    return json.loads(file.read_text())


@WITNESSED
def test_s7_units_are_torchs(answers: dict, world: int, kind: str, strategy: Strategy) -> None:
    """Torch gathers the same parameters together, in the same order."""
    layout = model_layout(small_units(kind), strategy=strategy, world_size=world)

    want = {unit: [[m.name for m in flat.members] for flat in flats] for unit, flats in layout.units.items()}

    for held in answers[f"{world} {kind} {strategy}"]:
        assert {unit: [names for names, _ in flats] for unit, flats in held.items()} == want


@WITNESSED
def test_s1_s2_every_part_is_what_torch_holds(answers: dict, world: int, kind: str, strategy: Strategy) -> None:
    """Each rank holds just the elements of each parameter that the layout says."""
    layout = model_layout(small_units(kind), strategy=strategy, world_size=world)

    for rank, held in enumerate(answers[f"{world} {kind} {strategy}"]):
        numbers = np.array(list(chain.from_iterable(shard for flats in held.values() for _, shard in flats)))
        parts = layout.shard(rank)
        for name, whole in numbered(kind).items():
            got = numbers[(whole.min() <= numbers) & (numbers <= whole.max())]
            assert got.tolist() == whole.reshape(-1)[parts[name]].tolist(), (rank, name)


@WITNESSED
def test_s1_s2_every_place_in_memory_is_torchs(answers: dict, world: int, kind: str, strategy: Strategy) -> None:
    """Each rank's memory is as long as the layout says, padding included, and has each element where it says."""
    layout, numbers = model_layout(small_units(kind), strategy=strategy, world_size=world), numbered(kind)

    for rank, held in enumerate(answers[f"{world} {kind} {strategy}"]):
        for unit, flats in layout.units.items():
            for flat, (_, shard) in zip(flats, held[unit], strict=True):
                want = np.zeros(flat.size)
                for member in flat.members:
                    want[member.start : member.start + member.size] = numbers[member.name].reshape(-1)
                got = [number if number >= FIRST else 0 for number in shard]
                assert got == want[flat.rank_range(rank)].tolist(), (rank, unit)


# The witness: what follows runs in processes of their own, and takes nothing from `ref` but shapes.


def hold(rank: int, *, world: int, store: str) -> dict:
    """One rank: what it holds under every strategy, by unit: names and numbers of each flat parameter."""
    import torch  # noqa: PLC0415 - only ranks shard

    torch.set_num_threads(1)
    group = {"init_method": f"file://{store}", "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, **group)
    held = {
        f"{world} {kind} {strategy}": dict(torch_units(kind, strategy)) for kind, strategy in product(KINDS, STRATEGIES)
    }
    torch.distributed.destroy_process_group()
    return held


def torch_units(kind: str, strategy: str) -> Iterator[tuple[str, list]]:
    """The units of a numbered Llama as this rank has them."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # noqa: PLC0415 - only ranks shard

    from torch_impl.wrappers import unwrapped_name  # noqa: PLC0415 - likewise

    model = sharded(kind, strategy)
    for prefix, module in model.named_modules():
        path = unwrapped_name(prefix)
        if isinstance(module, FullyShardedDataParallel):
            flat = module._handle.flat_param
            yield path, [([unwrapped_name(f"{path}.{name}") for name in flat._fqns], flat.detach().tolist())]
        elif isinstance(module, FSDPModule):
            inner = [name for name, child in module.named_modules() if name and isinstance(child, FSDPModule)]
            yield (
                path,
                [
                    ([unwrapped_name(f"{path}.{name}")], whole_storage(parameter.to_local()))
                    for name, parameter in module.named_parameters()
                    if not name.startswith(tuple(f"{other}." for other in inner))
                ],
            )


def whole_storage(local) -> list[float]:
    """All that lies in memory behind a rank's rows, which FSDP2 pads to the height of the first rank's."""
    return local.detach().new_empty(0).set_(local.untyped_storage()).tolist()


def sharded(kind: str, strategy: str):
    """A small Llama, its elements numbered, with adapters, sharded by the project's rule."""
    import torch  # noqa: PLC0415 - only ranks shard
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - likewise

    from torch_impl import DoraConfig, ShardConfig, apply_dora, shard_model  # noqa: PLC0415 - likewise

    rank, wire = KINDS[kind]
    dtype = None if wire is None else getattr(torch, wire)
    config = LlamaConfig(
        vocab_size=SMALL["vocabulary"],
        hidden_size=SMALL["width"],
        intermediate_size=SMALL["inner"],
        num_hidden_layers=SMALL["blocks"],
        head_dim=2,
        num_attention_heads=SMALL["queries"] // 2,
        num_key_value_heads=SMALL["keys"] // 2,
        tie_word_embeddings=False,
    )
    model = apply_dora(LlamaForCausalLM(config), DoraConfig(rank=rank, alpha=2, compute_dtype=dtype))
    numbers = numbered(kind)
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == numbers[name].shape, name
        parameter.data = torch.from_numpy(numbers.pop(name))
    assert not numbers
    return shard_model(model, ShardConfig(strategy=strategy, param_dtype=dtype, units="layer"))


def witness(file: Path) -> None:
    """Ask every rank of every world, and write down what they say."""
    import transformers.models.llama.modeling_llama  # noqa: F401, PLC0415 - ranks are forks of what has loaded it

    import torch_impl  # noqa: F401, PLC0415 - likewise

    found = {}
    for world in range(1, 9):
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, get_context("fork")) as pool:
            ranks = list(pool.map(partial(hold, world=world, store=f"{folder}/store"), range(world)))
        found |= {key: [held[key] for held in ranks] for key in ranks[0]}
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    witness(Path(sys.argv[1]))
