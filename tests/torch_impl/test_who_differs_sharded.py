"""What SPEC.md says of torch and peft under `Differs`, where parameters are sharded, by running them on two ranks.

Where one of these fails, the other project has changed, and SPEC.md is to be corrected.
"""

import math
from pathlib import Path

import pytest
from ranks import Pools

EXACT = 64 * 2.0**-53


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig"])
def test_s5_torchs_clipping_has_a_norm_for_each_rank_of_fsdp1(pools: Pools, strategy: str) -> None:
    """`torch.nn.utils.clip_grad_norm_` takes each rank's own norm under FSDP1, whose root sum is the true one."""
    owns, wholes = zip(*pools.run(2, "peer_ranks:clipped", strategy=strategy), strict=True)

    assert all(own < 0.95 * whole for own, whole in zip(owns, wholes, strict=True))
    assert math.hypot(*owns) == pytest.approx(wholes[0], rel=EXACT)


@pytest.mark.distributed
def test_s5_torchs_clipping_has_one_norm_under_fsdp2(pools: Pools) -> None:
    """Torch agrees here: under FSDP2 it is the whole gradient's."""
    owns, wholes = zip(*pools.run(2, "peer_ranks:clipped", strategy="fsdp2"), strict=True)

    assert owns == pytest.approx(wholes, rel=EXACT)


@pytest.mark.distributed
def test_c4_peft_writes_a_shard_under_the_wholes_name(pools: Pools, tmp_path: Path) -> None:
    """Under FSDP1 with original parameters each rank of peft writes its part, empty or not, and nothing is said."""
    parts = pools.run(2, "peer_ranks:peft_saves", strategy="fsdp1-orig", folder=tmp_path)

    for name, (_, size) in parts[0].items():
        assert sum(part[name][0] for part in parts) == size
    assert any(0 < count < size or count == 0 for part in parts for count, size in part.values())


@pytest.mark.distributed
def test_c4_peft_raises_under_fsdp2(pools: Pools, tmp_path: Path) -> None:
    """Under FSDP2 peft writes nothing: it asks a DTensor where its numbers lie."""
    said = pools.run(2, "peer_ranks:peft_saves", strategy="fsdp2", folder=tmp_path)

    assert all("invalid python storage" in text for text in said)
