"""Matrix products; float32 ones on a CPU by oneDNN or by torch's own BLAS, whichever is faster there.

Axes: O output features, I input features.

torch gives a CPU's bfloat16 products to oneDNN and its float32 ones to MKL, which has no AVX-512 path for processors of
other makers: on one of those oneDNN takes 0.45 of MKL's time, on one without AVX-512 as long as MKL. Both sum in
float32, in other orders, so that the choice changes bits: it is made once a machine and kept in the user's cache, and
`shard_model` gives every rank the first one's. The product that D12 holds to the plain layer's bits, x W', is left to
torch; these are the backward pass's and the norm's.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, distributed

Kernel = Literal["onednn", "torch"]
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch has the operator that `torch.compile` gives linear layers to."""
_FASTER = 0.95  # of torch's time, below which another kernel is worth its other order of sums
_SIZES = ((256, 512, 1024), (16, 512, 1024))  # T, O, I: a layer's, and an adapter's
_ROUNDS = 7
_agreed: list[Kernel] = []  # what the first rank has, once there are ranks


def product(x: Float[Tensor, "... I"], W_OI: Float[Tensor, "O I"]) -> Float[Tensor, "... O"]:
    """Give x W', in the dtype of both.

    Args:
        x: any leading axes, any strides.
        W_OI: any strides; the transpose of a matrix costs no copy.
    """
    if torch.compiler.is_compiling():  # the compiler has kernels of its own
        return x @ W_OI.T
    recorded = torch.is_grad_enabled() and (x.requires_grad or W_OI.requires_grad)  # oneDNN's operator has no gradient
    on_cpu_in_float32 = x.device.type == "cpu" and x.dtype == W_OI.dtype == torch.float32
    if on_cpu_in_float32 and not recorded and x.numel() and W_OI.numel() and float32_kernel() == "onednn":
        return _onednn(x, W_OI)
    return x @ W_OI.T


def float32_kernel() -> Kernel:
    """What multiplies float32 matrices on this CPU: the first rank's choice once ranks agree, or this machine's."""
    return _agreed[0] if _agreed else _of_this_machine()


def agree(device: torch.device) -> None:
    """Take the first rank's choice on all ranks of the default group; a collective, on `device`."""
    chosen = torch.tensor(int(_of_this_machine() == "onednn"), device=device)
    distributed.broadcast(chosen, src=0)
    _agreed[:] = ["onednn" if bool(chosen) and HAS_ONEDNN else "torch"]


@functools.cache
def _of_this_machine() -> Kernel:
    """As the cache has it, or else as a probe finds; torch's where neither can be.

    Whoever writes first decides, so that processes that begin together have one choice.
    """
    if not HAS_ONEDNN:
        return "torch"
    place = _cache_file()
    with contextlib.suppress(OSError):
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".product-") as aside:
                json.dump({"float32": _probe()}, aside)
                aside.flush()
                with contextlib.suppress(FileExistsError):
                    os.link(aside.name, place)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return "onednn" if json.loads(place.read_text())["float32"] == "onednn" else "torch"
    return "torch"


def _cache_file() -> Path:
    """One for each processor and torch, under $DORA_PARITY_CACHE, $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("DORA_PARITY_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora-parity"
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_processor()} {torch.__version__}"
    return (Path(given) if given else home) / f"product-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    """The processor's name, where the system has a list."""
    with contextlib.suppress(OSError):
        names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        return next(names, "").partition(":")[2].strip()
    return platform.processor()


def _probe() -> Kernel:
    """By the median of some rounds in which both take turns, on one thread as on many."""
    ratios = []
    for T, O, I in _SIZES:  # noqa: E741 - axes
        x, W = torch.ones(T, I), torch.ones(O, I)
        turns = (lambda x=x, W=W: _onednn(x, W), lambda x=x, W=W: x @ W.T)
        ratios += [_seconds(turns[0]) / _seconds(turns[1]) for _ in range(_ROUNDS)]
    return "onednn" if statistics.median(ratios) < _FASTER else "torch"


def _onednn(x: Tensor, W_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, W_OI, None, "none", [], "")  # noqa: SLF001 - it has no public name


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
