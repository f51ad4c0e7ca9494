"""Run by ranks: the one-hot proof (link 2) on a stack of linears. Every rank but the hot one has a zero cotangent."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_impl import (
    DoraConfig,
    DoraError,
    QuantConfig,
    ShardConfig,
    apply_dora,
    local_shards,
    save_adapter,
    shard_model,
)
from torch_impl.sharding.local_shards import LocalShard


@dataclass(frozen=True)
class Stack:
    """A stack of linears and how it is stored and computed."""

    sizes: tuple[int, ...] = (66, 65, 48)
    rank: int = 3
    bias: bool = True
    model_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    quant: QuantConfig | None = None
    param_dtype: torch.dtype | None = None
    zero_rows: tuple[int, ...] = ()
    tokens: int = 7
    steps: int = 2


@dataclass
class Evidence:
    """What was compared, and what differed (name, kind, number of elements, largest difference)."""

    compared: int = 0
    non_zero: int = 0
    differing: list[tuple[str, str, int, float]] = field(default_factory=list)

    def add(self, shard: LocalShard, expected: Tensor) -> None:
        """Compare a shard with its slice of the expected whole, bit for bit but for the sign of zero."""
        want = part(expected, shard)
        assert want.shape == shard.tensor.shape, (shard.name, shard.kind, want.shape, shard.tensor.shape)
        assert want.dtype == shard.tensor.dtype, (shard.name, want.dtype, shard.tensor.dtype)
        self.compared += want.numel()
        self.non_zero += int(torch.count_nonzero(want))
        unequal = ~((want == shard.tensor) | (want.isnan() & shard.tensor.isnan()))
        if bool(unequal.any()):
            self.differing.append(
                (shard.name, shard.kind, int(unequal.sum()), float((want - shard.tensor).abs().double().max()))
            )


def part(whole: Tensor, shard: LocalShard) -> Tensor:
    """The slice of a whole tensor that a shard claims to be."""
    flat = len(shard.index) == 1 and len(shard.global_shape) != 1
    return whole.reshape(-1)[shard.index[0]] if flat else whole[shard.index]


class Net(nn.Module):
    """The layers of a stack, one after the other."""

    def __init__(self, case: Stack) -> None:
        super().__init__()
        pairs = zip(case.sizes, case.sizes[1:], strict=False)
        torch.manual_seed(4)  # the same weights on every rank
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=case.bias) for i, o in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return x


def build(case: Stack) -> nn.Module:
    """The same unsharded model on every rank, with B != 0 and magnitudes off their start."""
    torch.manual_seed(5)
    net = Net(case).to(case.model_dtype)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight[[row for row in case.zero_rows if row < layer.weight.shape[0]]] = 0
    net = apply_dora(net, DoraConfig(rank=case.rank, alpha=5, quant=case.quant, compute_dtype=case.compute_dtype))
    with torch.no_grad():
        for layer in net.layers:
            layer.lora_B.normal_(std=0.05)
            layer.lora_B[[row for row in case.zero_rows if row < layer.lora_B.shape[0]]] = 0
            layer.reset_magnitude()
            layer.magnitude.mul_(1 + 0.1 * torch.rand_like(layer.magnitude))
    return net


def batch(case: Stack, *, step: int, owner: int) -> tuple[Tensor, Tensor]:
    """Give x and G of one rank at one step."""
    generator = torch.Generator().manual_seed(1000 * step + owner)
    x = torch.randn(case.tokens, case.sizes[0], generator=generator)
    G = torch.randn(case.tokens, case.sizes[-1], generator=generator)
    return x.to(case.model_dtype), G.to(case.model_dtype)


def expected_gradients(net: nn.Module, x: Tensor, G: Tensor, *, world: int) -> None:
    """The unsharded gradient over the world size, left in `.grad`."""
    net.zero_grad()
    (net(x) * G).sum().backward()
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad /= world


def run(*, rank: int, world: int, strategy: str, case: Stack) -> dict[str, Any]:
    """One-hot steps with each rank hot in turn: gradients, momenta and parameters against the unsharded ones."""
    whole = build(case)
    sharded = shard_model(build(case), ShardConfig(strategy=strategy, param_dtype=case.param_dtype))
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in (whole, sharded)
    ]
    evidence = Evidence()
    for step in range(max(case.steps, world)):
        hot = step % world
        expected_gradients(whole, *batch(case, step=step, owner=hot), world=world)
        x, G = batch(case, step=step, owner=rank)
        sharded.zero_grad()
        (sharded(x) * (G if rank == hot else torch.zeros_like(G))).sum().backward()
        _compare(evidence, whole, sharded, optimizers, kinds=("gradient", "parameter"))
        for optimizer in optimizers:
            optimizer.step()
        _compare(evidence, whole, sharded, optimizers, kinds=("parameter", "optimizer:momentum_buffer"))
    shards = list(local_shards(sharded, optimizers[1]))
    return {"evidence": evidence, "held": {(s.name, s.kind): s.tensor.numel() for s in shards}}


def _compare(
    evidence: Evidence, whole: nn.Module, sharded: nn.Module, optimizers: list, *, kinds: tuple[str, ...]
) -> None:
    """Every shard of these kinds against the unsharded model's, and the same names on both sides."""
    wanted = {(s.name, s.kind): s.tensor for s in local_shards(whole, optimizers[0]) if s.kind in kinds}
    got = {(s.name, s.kind): s for s in local_shards(sharded, optimizers[1]) if s.kind in kinds}
    missing = set(wanted) - set(got)
    assert not {key for key in missing if not key[1].startswith("optimizer")}, missing
    assert not set(got) - set(wanted), set(got) - set(wanted)
    for key, shard in got.items():
        evidence.add(shard, wanted[key])


def cases() -> Iterator[tuple[str, Stack]]:
    """The table of stacks, by name."""
    nf4, bf16, f32 = QuantConfig(), torch.bfloat16, torch.float32
    yield "f32", Stack()
    yield "f32-no-bias", Stack(bias=False)
    yield "f32-zero-rows", Stack(zero_rows=(0, 7, 64))
    yield "bf16-base-f32-compute", Stack(model_dtype=bf16, compute_dtype=f32)
    yield "bf16-compute", Stack(model_dtype=bf16)
    yield "bf16-compute-f32-base", Stack(compute_dtype=bf16, param_dtype=bf16)
    yield "nf4", Stack(quant=nf4)
    yield "nf4-plain-f32-storage", Stack(quant=QuantConfig(nested=False, quant_storage=f32))
    yield "nf4-bf16", Stack(quant=nf4, model_dtype=bf16, param_dtype=bf16)
    yield "out-1", Stack(sizes=(66, 1), rank=2)
    yield "out-1-nf4", Stack(sizes=(66, 1), rank=2, quant=nf4)
    yield "in-1", Stack(sizes=(1, 33, 5), rank=1)
    yield "rank-1", Stack(rank=1)
    yield "one-token", Stack(tokens=1)
    yield "wide-rank", Stack(rank=17, sizes=(130, 33, 70))


def save(*, rank: int, world: int, strategy: str, case: Stack, folder: str) -> None:
    """Every rank saves the sharded adapter."""
    del rank, world
    save_adapter(shard_model(build(case), ShardConfig(strategy=strategy)), folder)


def save_fails(*, rank: int, world: int, case: Stack, folder: str) -> str:
    """The class of what saving raised on this rank."""
    try:
        save(rank=rank, world=world, strategy="fsdp2", case=case, folder=folder)
    except DoraError as error:
        return type(error).__name__
    return "nothing"
