"""S1 to S3, S7, C4: layers of every kind under FSDP, with a one-hot rank, and what they save."""

from pathlib import Path

import kinds_onehot
import pytest
import torch
from kinds_onehot import TARGETS
from ranks import Pools

from torch_impl import save_adapter

pytestmark = pytest.mark.distributed
of_strategies = pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
CONFIGS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "lora": {"method": "lora"},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", CONFIGS)
@of_strategies
def test_s3_one_hot_gradient_of_every_kind_is_the_slice_of_the_unsharded_one(
    pools: Pools, strategy: str, name: str
) -> None:
    """Each rank's gradients, momenta and parameters are the slices of the unsharded ones over the world size."""
    answers = pools.run(2, "kinds_onehot:run", strategy=strategy, config=CONFIGS[name])

    leaves = ["lora_A", "lora_B"] if name == "lora" else ["lora_A", "lora_B", "magnitude"]
    assert [a["evidence"].differing for a in answers] == [[], []]
    assert {name for a in answers for name in a["gradients"]} == {f"{t}.{leaf}" for t in TARGETS for leaf in leaves}
    assert sum(a["evidence"].non_zero for a in answers) > sum(a["evidence"].compared for a in answers) / 4


@of_strategies
def test_s7_every_unit_of_every_kind_is_really_sharded(pools: Pools, strategy: str) -> None:
    """The ranks' parts add up to each parameter, and no rank holds a whole weight."""
    answers = pools.run(2, "kinds_onehot:run", strategy=strategy, config={})

    first, second = (a["held"] for a in answers)
    whole = {name: parameter.numel() for name, parameter in kinds_onehot.build().named_parameters()}
    assert {name: first[name] + second[name] for name in first} == whole
    assert all(max(first[n], second[n]) < whole[n] for n in whole if n.endswith("base.weight"))


@of_strategies
def test_c4_every_kind_is_saved_whole(pools: Pools, tmp_path: Path, strategy: str) -> None:
    """From any strategy the files are those of the unsharded model, byte for byte."""
    with pytest.warns(UserWarning, match="peft pads, groups or dilates narrow, picture otherwise"):
        save_adapter(kinds_onehot.build(), tmp_path / "whole")

    pools.run(2, "kinds_onehot:save", strategy=strategy, folder=str(tmp_path / "sharded"))

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
