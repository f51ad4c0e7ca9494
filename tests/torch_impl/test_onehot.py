"""S1, S2, S3 with a one-hot rank: a rank holds the slice of the unsharded result, bit for bit, on Gaussian data."""

import pytest
from onehot import Stack, cases
from ranks import Pools

TABLE = dict(cases())
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_s3_one_hot_gradient_is_the_slice_of_the_unsharded_one(
    pools: Pools, world: int, strategy: str, name: str
) -> None:
    """Each rank's gradients, momenta and parameters are the slices of the unsharded ones over the world size."""
    answers = pools.run(world, "onehot:run", strategy=strategy, case=TABLE[name])

    assert [a["evidence"].differing for a in answers] == [[]] * world
    assert sum(a["evidence"].non_zero for a in answers) > 0


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s7_every_unit_is_really_sharded(pools: Pools, strategy: str) -> None:
    """No rank holds a whole parameter, frozen weights included, and the ranks' parts add up to it."""
    answers = pools.run(2, "onehot:run", strategy=strategy, case=Stack())

    held = [{name: n for (name, kind), n in a["held"].items() if kind == "parameter"} for a in answers]
    assert held[0].keys() == held[1].keys()
    assert {name: held[0][name] + held[1][name] for name in held[0]} == WHOLE
    assert max(held[0]["layers.0.base.weight"], held[1]["layers.0.base.weight"]) <= 33 * 66


WHOLE = {
    "layers.0.lora_A": 3 * 66,
    "layers.0.lora_B": 65 * 3,
    "layers.0.magnitude": 65,
    "layers.0.base.weight": 65 * 66,
    "layers.0.bias.value": 65,
    "layers.1.lora_A": 3 * 65,
    "layers.1.lora_B": 48 * 3,
    "layers.1.magnitude": 48,
    "layers.1.base.weight": 48 * 65,
    "layers.1.bias.value": 48,
}
