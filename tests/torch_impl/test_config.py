"""D1, Q, S6, S7: what is refused when it is declared, in one line that names value and mend."""

import dataclasses
import math

import pytest
import torch

from torch_impl import DoraConfig, DoraError, QuantConfig, ShardConfig
from torch_impl.errors import DtypeError, OptionError, RankError, ScalingError, ShardingError, StorageError, TargetError

BAD = {
    "rank-0": (lambda: DoraConfig(rank=0, alpha=1), RankError, "rank 0"),
    "rank-negative": (lambda: DoraConfig(rank=-2, alpha=1), RankError, "rank -2"),
    "rank-fraction": (lambda: DoraConfig(rank=1.5, alpha=1), RankError, "rank 1.5"),
    "rank-bool": (lambda: DoraConfig(rank=True, alpha=1), RankError, "rank True"),
    "alpha-0": (lambda: DoraConfig(rank=1, alpha=0), ScalingError, "alpha 0"),
    "alpha-nan": (lambda: DoraConfig(rank=1, alpha=math.nan), ScalingError, "alpha nan"),
    "alpha-infinite": (lambda: DoraConfig(rank=1, alpha=math.inf), ScalingError, "alpha inf"),
    "alpha-text": (lambda: DoraConfig(rank=1, alpha="16"), ScalingError, "alpha '16'"),
    "dropout-1": (lambda: DoraConfig(rank=1, alpha=1, dropout=1.0), OptionError, "dropout 1.0"),
    "no-targets": (lambda: DoraConfig(rank=1, alpha=1, target_modules=[]), TargetError, "empty"),
    "quant-unknown": (lambda: DoraConfig(rank=1, alpha=1, quant="int8"), StorageError, "'int8'"),
    "compute-integer": (lambda: DoraConfig(rank=1, alpha=1, compute_dtype=torch.int8), DtypeError, "torch.int8"),
    "blocksize": (lambda: QuantConfig(blocksize=48), StorageError, "blocksize 48"),
    "code-unknown": (lambda: QuantConfig(quant_type="int4"), StorageError, "'int4'"),
    "storage-wide": (lambda: QuantConfig(quant_storage=torch.float64), StorageError, "torch.float64"),
    "strategy-unknown": (lambda: ShardConfig(strategy="zero3"), ShardingError, "'zero3'"),
    "offload-fsdp1": (lambda: ShardConfig("fsdp1", cpu_offload=True), ShardingError, "fsdp1 doesn't offload here"),
    "wire-integer": (lambda: ShardConfig(param_dtype=torch.int8), DtypeError, "param_dtype torch.int8"),
    "reduce-integer": (lambda: ShardConfig(reduce_dtype=torch.int8), DtypeError, "reduce_dtype torch.int8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_in_one_line(name: str) -> None:
    """Each bad value raises its own class, on one line that names the value and carries a hint."""
    make, error, part = BAD[name]

    with pytest.raises(error) as caught:
        make()

    assert part in str(caught.value)
    assert caught.value.hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DoraError)


def test_d1_scaling() -> None:
    """The scaling is alpha / r, or alpha / sqrt(r) when rank-stabilised."""
    assert DoraConfig(rank=4, alpha=6).scaling == 1.5
    assert DoraConfig(rank=4, alpha=6, rank_stabilized=True).scaling == 3.0


def test_nf4_means_nested() -> None:
    """The name "nf4" is QLoRA's storage: blocks of 64, nested, viewed as bfloat16."""
    assert DoraConfig(rank=1, alpha=1, quant="nf4").quant_config == QuantConfig("nf4", 64, True, torch.bfloat16)


def test_units_are_freed_after_the_forward_unless_told() -> None:
    """What FSDP is for: no two blocks are whole at a time."""
    assert ShardConfig().reshard_after_forward


def test_configurations_are_frozen() -> None:
    """What was validated can't be changed afterwards."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        DoraConfig(rank=1, alpha=1).rank = 0
