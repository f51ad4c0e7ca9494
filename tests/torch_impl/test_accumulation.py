"""T5: whether gradients are reduced once a step, or at each micro-batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from torch_impl.training.accumulation import synchronised


class Counted(nn.Linear):
    """A replica that counts how often its gradients stay on the rank."""

    kept = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DDP's and FSDP1's."""
        self.kept += 1
        yield


@pytest.mark.parametrize(("when", "kept"), [(True, 0), (False, 1)])
def test_t5_a_backward_is_reduced_when_it_is_to_be(when: bool, kept: int) -> None:
    """A backward pass that is to be late is reduced at once, or the last one is not."""
    model = Counted(2, 2)

    with synchronised(model, when=when):
        model(torch.ones(1, 2)).sum().backward()

    assert model.kept == kept
