"""S7, S8: blocks compiled one by one, without a break, alone and under FSDP2."""

from collections.abc import Iterator
from itertools import product

import compiled
import mixtures
import pytest
import torch
from compiled import EXACT
from ranks import Pools
from torch import Tensor, nn

from torch_impl import DoraConfig, apply_dora, compile_blocks
from torch_impl.errors import ShardingError

pytestmark = pytest.mark.filterwarnings("default")  # torch warns itself while it traces
CONFIGS = {
    "plain": {},
    "nf4": {"quant": "nf4"},
    "nf4-bf16": {"quant": "nf4", "dtype": torch.bfloat16},
    "bf16": {"dtype": torch.bfloat16},
    "lora": {"method": "lora"},
    "dropout": {"dropout": 0.3},
    "recomputed": {"recompute": True},
}
SHORT = ("plain", "nf4")
"""The others take long to trace, and are of `make test-long`."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing that was compiled before: a limit on how often one function may be."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, of one batch."""
    compiled.step(model, owner=0, scale=1.0)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CONFIGS])
def test_compiled_gradients_are_those_that_are_not_to_the_bit(name: str) -> None:
    """By torch's own kernels, in one graph a block: `fullgraph` raises at the first break."""
    want = gradients(compiled.build(**CONFIGS[name]))

    got = gradients(compiled.build(backend=EXACT, **CONFIGS[name]))

    assert got.keys() == want.keys()
    assert all(torch.equal(got[leaf], want[leaf]) for leaf in want)
    assert all(bool(gradient.any()) for gradient in want.values())


def test_blocks_that_are_alike_share_what_was_compiled() -> None:
    """Three blocks, two graphs: the first has an input without a gradient."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(EXACT)

    gradients(compiled.build(backend=counter))

    assert counter.frame_count == 2


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        pytest.param(strategy, name, marks=() if (strategy, name) == ("fsdp2", "nf4") else pytest.mark.long)
        for strategy, name in product(["fsdp2", "ddp"], CONFIGS)
    ],
)
def test_s3_compiled_shards_are_slices_of_the_compiled_whole(pools: Pools, strategy: str, name: str) -> None:
    """With a one-hot rank, bitwise."""
    found = pools.run(2, "compiled:run", backend=EXACT, config=CONFIGS[name], strategy=strategy)

    assert [evidence.differing for evidence in found] == [[], []]
    assert all(evidence.non_zero > evidence.compared / 4 for evidence in found)


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["plain", "nf4"])
def test_s3_so_they_are_by_inductor(pools: Pools, name: str) -> None:
    """And its own gradients agree with torch's kernels' but for roundings, some dozens of which follow one another."""
    want = gradients(compiled.build(**CONFIGS[name]))
    got = gradients(compiled.build(backend="inductor", **CONFIGS[name]))
    assert max(float((got[leaf] - want[leaf]).norm() / want[leaf].norm()) for leaf in want) < 1e-5

    found = pools.run(2, "compiled:run", backend="inductor", config=CONFIGS[name], strategy="fsdp2")

    assert [evidence.differing for evidence in found] == [[], []]


def test_blocks_with_experts_are_left_with_a_word() -> None:
    """The number of an expert is a value."""
    model = apply_dora(mixtures.plain("mixtral"), DoraConfig(2, 4, target_parameters=mixtures.STACKS))

    with pytest.warns(UserWarning, match=r"2 blocks are not compiled, model\.layers\.\d among them"):
        compile_blocks(model)

    assert "forward" not in vars(model.model.layers[0])


def test_what_cannot_be_compiled_is_refused() -> None:
    """Twice, or without adapters."""
    with pytest.raises(ShardingError, match="compiled already"):
        compile_blocks(compiled.build(backend=EXACT))
    with pytest.raises(ShardingError, match="no DoRA layer"):
        compile_blocks(nn.Sequential(nn.Linear(2, 2)))


REFUSED = {
    "fsdp1": ({"strategy": "fsdp1"}, "gathers inside of blocks"),
    "fsdp1-orig by blocks": ({"strategy": "fsdp1-orig", "units": "block"}, "gathers inside of blocks"),
    "fsdp2 by layers": ({"strategy": "fsdp2", "units": "layer"}, "gathers inside of blocks"),
    "sharded before": ({"strategy": "fsdp2", "late": True}, "call compile_blocks before shard_model"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", REFUSED)
def test_s7_units_inside_of_a_compiled_block_are_refused(pools: Pools, name: str) -> None:
    """Before anything is wrapped or compiled."""
    options, what = REFUSED[name]

    (said,) = pools.run(1, "compiled:refusal", **options)

    assert what in said
