"""S12, T6, C4: what one world size and strategy saved loads at any other, bit for bit, as shards."""

import json
from pathlib import Path

import pytest
import torch
from ranks import Pools
from safetensors import safe_open
from saves import whole

from torch_impl.files import checkpoint_disk as checkpoint_files

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "strategies",
    [("fsdp2", "fsdp1", "fsdp1-orig"), ("fsdp1", "fsdp2", "fsdp2"), ("fsdp1-orig", "ddp", "hsdp")],
    ids=["-".join(x) for x in [("from-fsdp2",), ("from-fsdp1",), ("from-fsdp1-orig",)]],
)
def test_s12_two_ranks_to_one_to_three(pools: Pools, tmp_path: Path, strategies: tuple[str, str, str]) -> None:
    """Parameters and moments are the same bits at every world size and under every strategy on the way."""
    folders = [str(tmp_path / str(world)) for world in (2, 1, 3)]

    two = pools.run(2, "saves:train_and_save", strategy=strategies[0], folder=folders[0])
    one = pools.run(1, "saves:load_and_save", strategy=strategies[1], folder=folders[0], onto=folders[1])
    three = pools.run(3, "saves:load_and_save", strategy=strategies[2], folder=folders[1], onto=folders[2])

    want = whole(two)
    assert {name.partition("/")[0] for name in want} == {"parameter", "optimizer:exp_avg", "optimizer:exp_avg_sq"}
    for got in (whole(one), whole(three)):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_t6_each_ranks_generator_goes_on(pools: Pools, tmp_path: Path) -> None:
    """At the world size that saved, every rank draws the numbers that it would have drawn."""
    want = pools.run(2, "saves:draws_saved", folder=str(tmp_path))

    assert pools.run(2, "saves:draws", folder=str(tmp_path)) == want
    assert want[0] != want[1]


def test_c3_c4_a_checkpoint_is_safetensors_and_json_of_shards(pools: Pools, tmp_path: Path) -> None:
    """No other kind of file is there, and no rank's file holds a sharded tensor whole."""
    pools.run(2, "saves:train_and_save", strategy="fsdp2", folder=str(tmp_path))

    place = checkpoint_files.newest(tmp_path)
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}
    sizes = json.loads((place / "state.json").read_text())["tensors"]
    for path in place.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = {name: file.get_slice(name).get_shape()[0] for name in file.keys() if name in sizes}  # noqa: SIM118
        assert all(held[name] < sizes[name] for name in held)
