"""T6: what the command fixes before the first product, so that bits depend on nothing that a user can't see."""

import os
import subprocess
import sys

import pytest

from torch_impl.__main__ import fix_kernels

PRODUCTS = """
import os
import torch_impl.__main__ as command
command.fix_kernels()
import torch
torch.set_num_threads(1)
W_OI, x_I = torch.randn(65, 66), torch.randn(66)
found = set()
for offset in range(16):
    moved = torch.empty(65 * 66 + offset)[offset:].view(65, 66).copy_(W_OI)
    found.add(tuple((moved @ x_I).tolist()))
print(os.environ["MKL_CBWR"], len(found))
"""


def test_t6_a_product_has_one_result_wherever_its_operands_lie() -> None:
    """Nothing in the environment: the command itself asks MKL for kernels that don't depend on addresses."""
    bare = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    command = [sys.executable, "-c", PRODUCTS]

    done = subprocess.run(command, check=True, capture_output=True, text=True, env=bare)  # noqa: S603 - our own words

    assert done.stdout.split() == ["AUTO,STRICT", "1"]


def test_t6_the_users_own_choice_of_kernels_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL_CBWR as given is left alone."""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")

    fix_kernels()

    assert os.environ["MKL_CBWR"] == "COMPATIBLE"
