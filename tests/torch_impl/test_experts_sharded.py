"""D16, S1 to S3, S7, C4: mixtures of experts under FSDP, with a one-hot rank, and what they save."""

from pathlib import Path

import mixtures
import pytest
import torch
from mixtures import MIXTURES
from ranks import Pools

from torch_impl import QuantConfig, save_adapter

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:peft has no DoRA on:UserWarning"),
]
STRATEGIES = {
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-layers": {"strategy": "fsdp2", "units": "layer"},
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp1-orig": {"strategy": "fsdp1-orig"},
    "ddp": {"strategy": "ddp"},
}
CONFIGS = {
    "plain": {},
    "nf4": {"quant": QuantConfig(blocksize=64)},
    "dropout": {"dropout": 0.3},
    "lora": {"method": "lora"},
    "bf16": {"dtype": torch.bfloat16},
}
of_strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def same(pools: Pools, *, world: int = 2, **of: object) -> None:
    """No number of any rank's differs from the unsharded one's slice, and most are no zeros."""
    answers = pools.run(world, "mixtures:run", **of)

    assert [a["evidence"].differing for a in answers] == [[]] * world
    assert sum(a["evidence"].non_zero for a in answers) > sum(a["evidence"].compared for a in answers) / 4


@pytest.mark.parametrize("name", MIXTURES)
@of_strategies
def test_s3_one_hot_gradients_are_slices_of_the_unsharded_ones(pools: Pools, strategy: str, name: str) -> None:
    """Also of the experts that no token of a rank has visited."""
    same(pools, name=name, config={}, **STRATEGIES[strategy])


@pytest.mark.parametrize("config", ["nf4", "dropout", "lora", "bf16"])
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_s3_so_they_are_however_experts_are_stored(pools: Pools, strategy: str, config: str) -> None:
    """Four bits, dropout by token, no magnitude, bfloat16."""
    same(pools, name="gpt-oss", config=CONFIGS[config], **STRATEGIES[strategy])


def test_s3_where_a_rank_has_no_expert(pools: Pools) -> None:
    """Five experts by two, two and one; the fourth rank holds none."""
    same(pools, world=4, name="mixtral", config={}, strategy="fsdp2")


@of_strategies
def test_s7_every_stack_is_really_sharded(pools: Pools, strategy: str) -> None:
    """The ranks' parts add up to each parameter."""
    answers = pools.run(2, "mixtures:run", name="gpt-oss", config={}, **STRATEGIES[strategy])

    first, second = (a["held"] for a in answers)
    whole = {name: parameter.numel() for name, parameter in mixtures.build("gpt-oss").named_parameters()}
    copies = 2 if strategy == "ddp" else 1
    assert {name: first[name] + second[name] for name in first} == {name: copies * n for name, n in whole.items()}


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_c4_experts_are_saved_whole(pools: Pools, tmp_path: Path, strategy: str) -> None:
    """From any strategy the files are those of the unsharded model, byte for byte."""
    save_adapter(mixtures.build("gpt-oss"), tmp_path / "whole")

    pools.run(2, "mixtures:save", name="gpt-oss", strategy=strategy, folder=str(tmp_path / "sharded"))

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
