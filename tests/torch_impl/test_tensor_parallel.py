"""S10, S12, C4: features shared by tensor ranks, alone and beside FSDP2's shards; what is refused; what is saved."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from reference import gaussian
from runs import adapter, equal, losses
from safetensors.torch import load_file
from saves import whole
from tensor_ranks import REFUSED
from test_norm import allowed, exact_norm, worst
from torch import Tensor

pytestmark = pytest.mark.distributed
PLACES = [("tp", 2, 2), ("tp", 3, 3), ("tp", 4, 4), ("fsdp2-tp", 4, 2)]
of_places = pytest.mark.parametrize(("strategy", "world", "tensor"), PLACES)
ALL = ["gate", "up", "down", "mixed"]


def same(pools: Pools, world: int, **of: Any) -> None:
    """No output and no gradient of any rank differs, and the norm counts each number once (S5)."""
    for answer in pools.run(world, "tensor_ranks:differing", **of):
        assert answer["differing"] == []
        assert answer["compared"] > 0
        assert answer["norms"][0] == pytest.approx(answer["norms"][1], rel=2.0**-50)


@of_places
@pytest.mark.parametrize("targets", [ALL, ["down"], ["gate", "up"]], ids=["all", "row", "columns"])
def test_s10_each_ranks_part_is_the_unsharded_models(
    pools: Pools, strategy: str, world: int, tensor: int, targets: list[str]
) -> None:
    """Beside adapted layers also plain ones are cut, since what lies between reads their features."""
    same(pools, world, strategy=strategy, tensor=tensor, targets=targets)


@pytest.mark.parametrize(("strategy", "world", "tensor"), [("tp", 3, 3), ("fsdp2-tp", 4, 2)])
@pytest.mark.parametrize("config", [{"dropout": 0.5}, {"method": "lora"}], ids=["dropout", "lora"])
def test_s10_so_they_are_with_dropout_and_without_a_magnitude(
    pools: Pools, strategy: str, world: int, tensor: int, config: dict[str, Any]
) -> None:
    """Every rank draws the mask of the whole input, as the unsharded layer does (D9)."""
    same(pools, world, strategy=strategy, tensor=tensor, targets=ALL, **config)


def test_a_plan_goes_before_the_models_own(pools: Pools) -> None:
    """What the model's plan lacks or has otherwise."""
    assert pools.run(2, "tensor_ranks:planned") == [{"gate": "column", "up": "whole", "down": "row"}] * 2


def cancelling(left: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Rows with W = -s B A + tiny, which go to float64."""
    case = gaussian(64, 96, 4)
    B = case.B * 20
    return (-case.scaling * (B.double() @ case.A.double())).float() + left * case.W, case.A, B, case.scaling


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("size", "left"), [(1.0, None), (1e-30, None), (1e25, None), (1.0, 1e-3), (1.0, 1e-7)], ids=str
)
def test_s10_d4_norms_of_shared_rows_are_as_accurate_as_of_whole_ones(
    pools: Pools, world: int, size: float, left: float | None
) -> None:
    """Tiny, huge and cancelling rows; every rank has the same bits."""
    if left is None:
        case = gaussian(64, 96, 4)
        W, A, B, scaling = case.W * size, case.A, case.B * size, case.scaling
    else:
        W, A, B, scaling = cancelling(left)

    found = pools.run(world, "tensor_ranks:norms", W=W, A=A, B=B, scaling=scaling)

    assert all(torch.equal(norm, found[0]) for norm in found)
    assert worst(found[0], exact_norm(W, A, B, scaling)) <= allowed(96)


@pytest.mark.parametrize("fresh", [True, False], ids=["b-zero", "b"])
def test_s10_a_factor_that_is_not_finite_poisons_every_rank(pools: Pools, fresh: bool) -> None:
    """Also where it lies on another rank, and B is 0."""
    case = gaussian(8, 12, 2)
    A, B = case.A.clone(), case.B * (0.0 if fresh else 1.0)
    A[0, 11] = torch.inf

    found = pools.run(2, "tensor_ranks:norms", W=case.W, A=A, B=B, scaling=1.0)

    assert all(not torch.isfinite(norm).any() for norm in found)


@pytest.mark.parametrize("later", [False, True])
def test_unlike_batches_are_named_and_never_waited_for(pools: Pools, *, later: bool) -> None:
    """In the first backward, by their inputs; in a later forward, by copies of B that have parted since."""
    said = pools.run(2, "tensor_ranks:unlike_batches", later=later)

    assert all(line.startswith("ShardingError: tensor ranks have unlike copies of one tensor") for line in said)


def test_every_rank_is_told_of_unlike_copies(pools: Pools) -> None:
    """One that went on would wait for those that don't."""
    said = pools.run(3, "tensor_ranks:parted")

    assert all(line.startswith("tensor ranks have unlike copies of one tensor") for line in said)


@pytest.mark.parametrize("name", REFUSED)
def test_what_tensor_ranks_cannot_share_is_refused_in_one_line(pools: Pools, name: str) -> None:
    """By name and with the mend, before anything is changed."""
    error, part = REFUSED[name]
    for got in pools.run(5 if "5 tensor" in part else 2, "tensor_ranks:refused", name=name):
        assert got[0] == error
        assert part in got[1]
        assert "\n" not in got[1]
        assert got[2]


UNLOADED = {
    "heads": ({}, 4, "num_key_value_heads 2 don't divide among 4 tensor ranks"),
    "blocks": ({"quant": "nf4"}, 2, "a tensor rank's 24 numbers of each row are no whole blocks of 64"),
    "size": ({"strategy": "fsdp2-tp", "tensor_size": 3}, 4, "tensor_size 3 for fsdp2-tp in a world of 4"),
}


@pytest.mark.parametrize("name", UNLOADED)
def test_a_run_is_refused_before_a_weight_is_read(
    pools: Pools, options: Callable[..., dict[str, Any]], name: str
) -> None:
    """From the skeleton and what is to be put on it: the checkpoint's weights are gone, and nobody misses them."""
    changed, world, part = UNLOADED[name]
    run = options(**{"strategy": "tp", **changed})
    bare = run["out"].parent / "bare"
    shutil.copytree(run["model"], bare)
    for weights in bare.glob("*.safetensors"):
        weights.write_bytes(b"")

    for said in pools.run(world, "runs:train", options=run | {"model": bare}):
        assert said.startswith(("ShardingError: ", "StorageError: "))
        assert part in said


def test_s12_what_tensor_ranks_saved_others_read_and_they_read_others(pools: Pools, tmp_path: Path) -> None:
    """Two tensor ranks to three of FSDP2 to two by two: the same bits of parameters and moments."""
    two, three, four = (str(tmp_path / str(world)) for world in (2, 3, 4))

    first = whole(pools.run(2, "saves:train_and_save", strategy="tp", folder=two))
    second = whole(pools.run(3, "saves:load_and_save", strategy="fsdp2", folder=two, onto=three))
    third = whole(pools.run(4, "saves:load_and_save", strategy="fsdp2-tp", folder=three, onto=four))

    for got in (second, third):
        assert got.keys() == first.keys()
        assert all(torch.equal(got[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("world", "sharding"), [(2, {"strategy": "tp"}), (4, {"strategy": "fsdp2-tp", "tensor_size": 2})], ids=str
)
def test_t6_a_run_goes_on_and_counts_each_text_once(
    pools: Pools, options: Callable[..., dict[str, Any]], world: int, sharding: dict[str, Any]
) -> None:
    """To the bit of the run that was never stopped; its tokens are those of as many ranks as there are batches."""
    common = {"steps": 4, "dropout": 0.25, "eval_fraction": 0.2}
    run, cut, plain = (options(name, **common) for name in ("whole", "cut", "plain"))
    assert pools.run(world, "runs:train", options=run | sharding) == [""] * world
    pools.run(world, "runs:train", options=cut | sharding, stop_after=2)
    assert pools.run(world, "runs:train", options=cut | sharding | {"resume": True}) == [""] * world
    pools.run(world // 2, "runs:train", options=plain)

    assert equal(adapter(run), adapter(cut))
    assert adapter(run).keys() == adapter(plain).keys()
    first, other = losses(run)[0], losses(plain)[0]
    assert abs(first / other - 1) < 1e-3  # a tensor rank too many or too few would be a factor
    saved = load_file(run["out"] / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in adapter(plain).items()
    }
