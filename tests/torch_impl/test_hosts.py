"""Two hosts by torchrun's rendezvous: two network namespaces of one machine, joined by one wire."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import write_model, write_text

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(480)]
ADDRESSES = {"left": "10.213.7.1", "right": "10.213.7.2"}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)  # noqa: S603, S607 - our own words


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two namespaces with an address each."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    names = {side: f"dora{os.getpid()}{side[0]}" for side in ADDRESSES}
    try:
        for name in names.values():
            _ip("netns", "add", name)
        wires = {side: f"d{os.getpid()}{side[0]}" for side in names}
        _ip("link", "add", wires["left"], "type", "veth", "peer", "name", wires["right"])
        for side, name in names.items():
            _ip("link", "set", wires[side], "netns", name)
            _ip("-n", name, "addr", "add", f"{ADDRESSES[side]}/24", "dev", wires[side])
            for link in (wires[side], "lo"):
                _ip("-n", name, "link", "set", link, "up")
        yield names
    except subprocess.CalledProcessError as problem:
        pytest.skip(f"no network namespace can be made here: {problem.stderr.decode().strip()}")
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)  # noqa: S603, S607


@pytest.mark.long
def test_two_hosts_train_what_one_trains(tmp_path: Path, hosts: dict[str, str]) -> None:
    """A rank in each namespace, found by rendezvous, writes the adapter that two ranks of one host write."""
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    words = ["-m", "torch_impl", "train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt")]
    words += ["--steps", "3", "--seq-len", "24", "--quant", "nf4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    one = [*torchrun, "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    subprocess.run([*one, "--out", str(tmp_path / "one")], check=True, env=environment, cwd=root)  # noqa: S603

    jobs = []
    for side, name in hosts.items():
        meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES['left']}:29411"]
        meeting += ["--rdzv-conf", f"is_host={int(side == 'left')}"]  # torchrun can't tell from the machine's name
        here = ["ip", "netns", "exec", name, *torchrun, "1", *meeting, "--local-addr", ADDRESSES[side], *words]
        wire = environment | {"GLOO_SOCKET_IFNAME": f"d{os.getpid()}{side[0]}"}
        jobs.append(subprocess.Popen([*here, "--out", str(tmp_path / "two")], env=wire, cwd=root))  # noqa: S603
    try:
        assert [job.wait(200) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
            job.wait()

    left, right = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("one", "two"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
