"""S6, S7, S8, D11: what `shard_model` refuses, what goes over the wire, and where forwards may be run."""

import math

import pytest
from onehot import Stack, build
from ranks import Pools
from torch import nn

from torch_impl import DoraConfig, ShardConfig
from torch_impl.errors import ShardingError
from torch_impl.preflight.costs import Link
from torch_impl.preflight.report import preflight
from torch_impl.sharding import apply as sharding

pytestmark = pytest.mark.distributed

WIRES = {
    "weight": "torch.bfloat16",
    "adapter": ["torch.float32"] * 3,
    "gradients": ["torch.float32"],
    "rounded": False,
}
"""With param_dtype and reduce_dtype bf16: gradients of A, B and m are reduced in float32 as well."""


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_d11_param_dtype_never_reaches_the_adapter(pools: Pools, strategy: str) -> None:
    """With param_dtype bf16 the dense weight arrives in bf16; A, B, m and their gradients stay float32."""
    assert pools.run(2, "wires:dtypes", strategy=strategy, packed=False) == [WIRES] * 2


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "hsdp"])
def test_an_optimizer_made_too_early_is_refused(pools: Pools, strategy: str) -> None:
    """It holds what the model has no longer, and would train nothing without a word; one made in time trains."""
    for said, moved, moves in pools.run(2, "optimizers:steps", strategy=strategy):
        assert "made before shard_model" in said
        assert "lora_A" in said
        assert (moved, moves) == (False, True)


@pytest.mark.parametrize("strategy", ["fsdp1-orig", "ddp"])
def test_an_optimizer_whose_parameters_stay_may_be_made_before(pools: Pools, strategy: str) -> None:
    """These strategies keep the parameter objects: such an optimizer trains."""
    for said, moved, _ in pools.run(2, "optimizers:steps", strategy=strategy):
        assert (said, moved) == ("", True)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s6_param_dtype_never_reaches_packed_bytes(pools: Pools, strategy: str) -> None:
    """Bytes arrive in their storage dtype, bit for bit."""
    assert pools.run(2, "wires:dtypes", strategy=strategy, packed=True) == [WIRES] * 2


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
@pytest.mark.parametrize("own", [True, False], ids=["own-norm", "blocks-alone"])
def test_param_dtype_is_that_of_the_norms(pools: Pools, strategy: str, *, own: bool) -> None:
    """What is left in blocks and in the root arrives in bf16, and so do their inputs, whoever holds parameters."""
    answers = pools.run(2, "wires:norms", strategy=strategy, own=own)

    assert answers == [[("torch.bfloat16", "torch.bfloat16")] * (3 if own else 2)] * 2


@pytest.mark.parametrize("units", ["block", "layer"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
@pytest.mark.parametrize("own", [True, False], ids=["own-norm", "blocks-alone"])
def test_s7_units_change_no_dtype_of_a_norm(pools: Pools, strategy: str, units: str, *, own: bool) -> None:
    """Norms and their inputs are bf16 whatever is gathered together."""
    answers = pools.run(2, "wires:norms", strategy=strategy, own=own, units=units)

    assert answers == [[("torch.bfloat16", "torch.bfloat16")] * (3 if own else 2)] * 2


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s7_the_units_are_block_and_root(pools: Pools, strategy: str) -> None:
    """With `units="block"`; FSDP1 wraps a block once for what is frozen and once for what trains."""
    times = 1 if strategy == "fsdp2" else 2
    want = ["", *(f"_blocks.{block}" for block in range(2) for _ in range(times))]

    assert pools.run(2, "wires:units", strategy=strategy, units="block") == [want] * 2


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s7_the_units_are_base_bias_adapter_block_and_root(pools: Pools, strategy: str) -> None:
    """With `units="layer"` each block's norms are gathered by themselves, not the whole model's at once."""
    layers = [f"_blocks.{block}.linear" for block in range(2)]
    want = {
        "",
        "_blocks.0",
        "_blocks.1",
        *layers,
        *(f"{layer}.{part}" for layer in layers for part in ("base", "bias")),
    }

    assert pools.run(2, "wires:units", strategy=strategy, units="layer") == [sorted(want)] * 2


@pytest.mark.parametrize("wire", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("units", ["block", "layer"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2", "hsdp", "fsdp1-hybrid"])
def test_s7_preflight_knows_how_often_a_step_communicates(
    pools: Pools, strategy: str, units: str, *, wire: bool
) -> None:
    """Gathers and reductions of one step, planned from shapes and counted where it runs."""
    for counted, planned in pools.run(4, "wires:collectives", strategy=strategy, units=units, wire=wire):
        assert counted == planned
        assert counted["gathers"] > counted["reductions"] > 0


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_reduce_dtype_is_that_of_norms_that_train(pools: Pools, strategy: str) -> None:
    """Where it is given alone, norms' gradients are reduced in bf16 and adapters' in float32."""
    answers = pools.run(2, "wires:rounded", strategy=strategy, units="layer")

    assert answers == [{"norm": {True}, "adapter": {False}}] * 2


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_a_block_that_is_one_unit_reduces_its_norms_with_its_adapters(pools: Pools, strategy: str) -> None:
    """In float32 (D11); the model's own norm, which is the root's, in bf16."""
    answers = pools.run(2, "wires:rounded", strategy=strategy, units="block")

    assert {rounded for answer in answers for rounded in answer["norm"]} == {True, False}
    assert [answer["adapter"] for answer in answers] == [{False}] * 2


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_d12_neutral_start_holds_after_sharding(pools: Pools, strategy: str) -> None:
    """With B = 0 every c is exactly 1 on every rank, and y is the base's product, dense and packed."""
    assert pools.run(3, "wires:neutral_start", strategy=strategy) == [[True] * 4] * 3


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_local_shards_after_a_forward_without_backward(pools: Pools, strategy: str) -> None:
    """An evaluation leaves gathered parameters in the root; what is reported is still the shards."""
    assert pools.run(2, "wires:shards_after_evaluation", strategy=strategy) == [True, True]


UNLIKE = {
    "weight": "layers.0.base.weight is another on some rank",
    "absmax": "layers.0.base.absmax is another on some rank",
    "more": "ranks have models of unlike numbers of weights",
}


@pytest.mark.parametrize("what", UNLIKE)
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_ranks_with_unlike_models_are_told(pools: Pools, strategy: str, what: str) -> None:
    """Each would hold a part of another model: all of them hear of it, with the tensor's name."""
    for said in pools.run(3, "wires:unlike", strategy=strategy, what=what):
        assert said.startswith(f"ShardingError: {UNLIKE[what]}")


REFUSED = {
    "storage-against-wire": ("fsdp2", "StorageError", "param_dtype torch.float16 against quant_storage torch.bfloat16"),
    "integer-storage": ("fsdp1", "StorageError", "fsdp1 can't hold torch.uint8 bytes"),
    "wire-changes-weight": ("fsdp2", "ShardingError", "would change layers.0.base.weight"),
    "mixed-root": ("fsdp1", "ShardingError", "differ in dtype"),
    "mixed-training": ("fsdp2", "ShardingError", "train in one unit but differ in dtype"),
    "trained-scalar": ("fsdp2", "ShardingError", "extra trains and has no dimension to cut"),
    "sharded-twice": ("fsdp2", "ShardingError", "sharded already"),
    "no-adapter": ("fsdp2", "ShardingError", "no DoRA layer"),
    "late-reset": ("fsdp1", "ShardingError", "reset_magnitude needs the whole layer"),
    "late-cast": ("fsdp2", "StorageError", "a sharded packed weight can't be moved or cast"),
    "late-cast-flat": ("fsdp1", "StorageError", "a sharded packed weight can't be moved or cast"),
    "late-cast-orig": ("fsdp1-orig", "StorageError", "a sharded packed weight can't be moved or cast"),
    "late-reset-block": ("fsdp2", "ShardingError", "reset_magnitude needs the whole layer"),
    "late-merged-weight": ("fsdp2", "ShardingError", "merged_weight needs the whole layer"),
    "late-merge": ("fsdp1-orig", "ShardingError", "a sharded model can't be merged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_in_one_line(pools: Pools, name: str) -> None:
    """Every rank raises the same error, naming the tensor and the mend."""
    strategy, error, part = REFUSED[name]

    for got in pools.run(2, "wires:refused", strategy=strategy, name=name):
        assert got[0] == error
        assert part in got[1]
        assert "\n" not in got[1]


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_one_rank_is_told_nothing(pools: Pools, strategy: str) -> None:
    """At world size 1 torch would say, for each unit, that there is nothing to shard."""
    assert pools.run(1, "wires:warned", strategy=strategy) == [[]]


def test_a_group_is_wanted_before_anything_is_wrapped() -> None:
    """Without a process group the model is refused in one line, not by whatever torch says."""
    with pytest.raises(ShardingError, match="there is no process group"):
        sharding.shard_model(build(Stack()), ShardConfig("fsdp2"))


def test_integer_storage_shards_under_fsdp2(pools: Pools) -> None:
    """FSDP2 takes uint8 bytes, and gives the unsharded bits."""
    answers = pools.run(2, "wires:integer_storage", case=Stack())

    assert [evidence.differing for evidence in answers] == [[], []]


def test_offloaded_shards_are_gathered_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in host memory is sharded over GPUs to be offloaded: on a mesh of CPUs it would train there."""
    meshes: list[str] = []
    monkeypatch.setattr(sharding, "rank_mesh", lambda device, _: meshes.append(device))

    sharding._fully_shard(build(Stack()), ShardConfig(cpu_offload=True))
    sharding._fully_shard(build(Stack()), ShardConfig())

    assert meshes == ["cuda", "cpu"]


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("fsdp1", {"_flat_param"}),
        ("fsdp1-orig", {"lora_A", "lora_B", "magnitude"}),
        ("fsdp2", {"lora_A", "lora_B", "magnitude"}),
    ],
)
def test_s2_only_fsdp1_hides_what_it_flattens(pools: Pools, strategy: str, names: set[str]) -> None:
    """With original parameters the optimizer is given flat ones, or without them the members."""
    answers = pools.run(2, "wires:trained_names", strategy=strategy)

    assert answers == [names] * 2


@pytest.mark.parametrize("strategy", ["hsdp", "fsdp1-hybrid"])
def test_s9_models_share_the_groups_of_their_replicas(pools: Pools, strategy: str) -> None:
    """Another model makes no group: each has threads that nothing ends, and a process may have so many."""
    for counts in pools.run(4, "wires:group_counts", strategy=strategy):
        assert counts == counts[:1] * 3


@pytest.mark.parametrize("strategy", ["hsdp", "fsdp1-hybrid", "ddp"])
def test_s9_replicas_start_alike_whatever_their_seeds(pools: Pools, strategy: str) -> None:
    """Replicas that drew other adapters would never meet: both rows of the mesh hold the first rank's."""
    held = pools.run(4, "wires:started_alike", strategy=strategy)

    assert held[0] == held[2]
    assert held[1] == held[3]


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2", "hsdp"])
def test_s1_a_frozen_scalar_stays_whole(pools: Pools, strategy: str) -> None:
    """There is no dimension to cut."""
    assert pools.run(2, "wires:frozen_scalar", strategy=strategy) == [[3.0]] * 2


def test_s9_the_least_time_is_by_the_smallest_group() -> None:
    """Of 8 ranks in two rows, 4 gather together and 2 are replicas: a message is the least that a collective takes."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    link = Link(latency=1.0, bandwidth=math.inf)

    seconds = {
        strategy: preflight(model, ShardConfig(strategy), world_size=8, dora=DoraConfig(2, 4)).least_seconds(link)
        for strategy in ("fsdp2", "hsdp")
    }

    assert seconds == {"fsdp2": (4 + 2) * 3, "hsdp": 4 + 4}
