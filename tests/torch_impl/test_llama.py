"""S3, S7, S8 on a Hugging Face Llama with two blocks: each strategy trains it, with the unsharded bits."""

import pytest
from ranks import Pools

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("kind", ["f32", "bf16", "nf4", "nf4-bf16"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_s3_llama_one_hot_gradients_are_the_unsharded_ones(pools: Pools, strategy: str, kind: str) -> None:
    """Each rank's gradients, momenta and parameters are the slices of the unsharded network's, bit for bit."""
    answers = pools.run(2, "llama:run", strategy=strategy, kind=kind)

    assert [evidence.differing for evidence in answers] == [[], []]
    assert min(evidence.non_zero for evidence in answers) > 1000


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_d11_llama_trains_with_bf16_on_the_wire(pools: Pools, strategy: str) -> None:
    """A float32 network with param_dtype bf16 and bf16 compute gives finite float32 gradients."""
    assert pools.run(2, "llama:trains_with_param_dtype", strategy=strategy) == [True, True]
