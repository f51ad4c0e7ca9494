"""Run by ranks: dtypes on the wire, the neutral start, shards after evaluation, and refusals."""

import dataclasses
import warnings
from pathlib import Path

import onehot
import torch
from onehot import Evidence, Stack, build
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from torch_impl import (
    DoraConfig,
    DoraError,
    DoraLinear,
    QuantConfig,
    ShardConfig,
    apply_dora,
    local_shards,
    merge_adapter,
    shard_model,
)
from torch_impl.files.materialize import materialize
from torch_impl.layers import products
from torch_impl.preflight.report import preflight
from torch_impl.wrappers import unwrapped_name

BF16 = torch.bfloat16


def _seen_by_products(model: nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """What each layer's product is given, recorded while the model runs."""
    seen: list[tuple[torch.Tensor, ...]] = []
    for layer in (m for m in model.modules() if isinstance(m, DoraLinear)):
        plain = layer._by_rule

        def record(base: nn.Module, *tensors: torch.Tensor, plain=plain) -> torch.Tensor:
            seen.append((base.weight.detach().clone(), *(None if t is None else t.detach().clone() for t in tensors)))
            return plain(base, *tensors)

        layer._by_rule = record
    return seen


def dtypes(*, rank: int, world: int, strategy: str, packed: bool) -> dict[str, object]:
    """Dtypes in a product and of gradients, and whether one was rounded to bf16, with bf16 on the wire."""
    del rank, world
    case = Stack(compute_dtype=BF16, quant=QuantConfig() if packed else None)
    bits = [layer.base.weight.detach().clone() for layer in build(case).layers]
    model = shard_model(build(case), ShardConfig(strategy=strategy, param_dtype=BF16, reduce_dtype=BF16))
    seen = _seen_by_products(model)
    model(torch.randn(4, 66)).sum().backward()
    weight, _, *adapter, _, _ = seen[0]  # x before, b and the mask behind
    assert torch.equal(weight.view(torch.int16), bits[0].to(BF16).view(torch.int16))
    gradients = [shard.tensor for shard in local_shards(model) if shard.kind == "gradient"]
    return {
        "weight": str(weight.dtype),
        "adapter": [str(tensor.dtype) for tensor in adapter],
        "gradients": sorted({str(gradient.dtype) for gradient in gradients}),
        "rounded": any(torch.equal(part, part.to(BF16).float()) for part in gradients if part.numel()),
    }


class _Block(nn.Module):
    """A norm and what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        return self.linear(self.norm(x))


class _Blocks(nn.Module):
    """Two blocks in a list whose name begins as private ones do, and a norm of the model's own behind them or none."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(4)  # the same weights on every rank
        self._blocks, self.last = nn.ModuleList([_Block(), _Block()]), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        for block in self._blocks:
            x = block(x)
        return self.last(x)


def norms(*, rank: int, world: int, strategy: str, own: bool, units: str | None = None) -> list[tuple[str, str]]:
    """The dtypes of each norm's input and weight where a float32 model is run with param_dtype bf16."""
    del rank, world
    model = apply_dora(_Blocks(nn.LayerNorm(6) if own else nn.Identity()), DoraConfig(2, 4, compute_dtype=BF16))
    found: list[tuple[str, str]] = []
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.register_forward_pre_hook(lambda norm, x: found.append((str(x[0].dtype), str(norm.weight.dtype))))
    shard_model(model, ShardConfig(strategy=strategy, param_dtype=BF16, units=units))(torch.ones(3, 6))
    return found


def units(*, rank: int, world: int, strategy: str, units: str) -> list[str]:
    """The names of the modules that are units; the model itself has none."""
    del rank, world
    config = ShardConfig(strategy=strategy, units=units)
    model = shard_model(apply_dora(_Blocks(nn.LayerNorm(6)), DoraConfig(2, 4)), config)
    found = (
        name for name, module in model.named_modules() if isinstance(module, FSDPModule | FullyShardedDataParallel)
    )
    return sorted(unwrapped_name(name) for name in found)


def rounded(*, rank: int, world: int, strategy: str, units: str) -> dict[str, set[bool]]:
    """Whether bf16 holds the gradients of norms that train, and of adapters, with reduce_dtype bf16 alone."""
    del rank, world
    torch.manual_seed(3)
    model = apply_dora(_Blocks(nn.LayerNorm(6)), DoraConfig(2, 4))
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.requires_grad_(True)
    for layer in (module for module in model.modules() if isinstance(module, DoraLinear)):
        nn.init.normal_(layer.lora_B)
    model = shard_model(model, ShardConfig(strategy=strategy, reduce_dtype=BF16, units=units))
    model(torch.randn(3, 6)).square().sum().backward()
    found: dict[str, set[bool]] = {"norm": set(), "adapter": set()}
    for shard in local_shards(model):
        if shard.kind == "gradient" and shard.tensor.numel():
            of = "adapter" if "linear" in shard.name else "norm"
            found[of].add(torch.equal(shard.tensor, shard.tensor.to(BF16).float()))
    return found


def neutral_start(*, rank: int, world: int, strategy: str) -> list[bool]:
    """For dense and packed, float32 and bf16: whether y is exactly the base's product, so that c was exactly 1."""
    del rank, world
    results = []
    for quant in (None, QuantConfig()):
        for dtype in (torch.float32, BF16):
            torch.manual_seed(2)
            model = apply_dora(nn.Sequential(nn.Linear(66, 65, bias=False)).to(dtype), DoraConfig(2, 4, quant=quant))
            x = torch.randn(5, 66).to(dtype)
            want = x @ model[0].base.decode(model[0].base.weight, dtype=dtype).T
            results.append(torch.equal(shard_model(model, ShardConfig(strategy=strategy))(x), want))
    return results


def shards_after_evaluation(*, rank: int, world: int, strategy: str) -> bool:
    """Whether shards are the same before and after an evaluation, also of parameters in the root."""
    del rank, world
    model = onehot.Net(Stack())
    model.extra = nn.Linear(66, 66)
    model = apply_dora(model, DoraConfig(2, 4, target_modules=["layers.0", "layers.1"]))
    model = shard_model(model, ShardConfig(strategy=strategy))
    before = [(s.name, s.index, s.tensor.clone()) for s in local_shards(model)]
    with torch.no_grad():
        model(torch.randn(4, 66))
    after = [(s.name, s.index, s.tensor) for s in local_shards(model)]
    assert [b[:2] for b in before] == [a[:2] for a in after]
    return all(torch.equal(b[2], a[2]) for b, a in zip(before, after, strict=True))


def integer_storage(*, rank: int, world: int, case: Stack) -> Evidence:
    """The one-hot run with bytes held as uint8."""
    case = dataclasses.replace(case, quant=QuantConfig(quant_storage=torch.uint8))
    return onehot.run(rank=rank, world=world, strategy="fsdp2", case=case)["evidence"]


def refused(*, rank: int, world: int, strategy: str, name: str) -> tuple[str, str]:
    """The class and the line of what was raised."""
    del rank, world
    try:
        _refused(name, strategy)
    except DoraError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _refused(name: str, strategy: str) -> None:
    """Do what is to be refused."""
    config = ShardConfig(strategy=strategy)
    if name in _UNSHARDABLE:
        make, changed = _UNSHARDABLE[name]
        shard_model(make(), dataclasses.replace(config, **changed))
        return
    model = shard_model(build(Stack(quant=QuantConfig() if name.startswith("late-cast") else None)), config)
    layer = next(module for module in model.modules() if isinstance(module, DoraLinear))
    if name == "sharded-twice":
        shard_model(model, config)
    elif name.startswith("late-cast"):
        model.to(torch.float16)
    elif name.startswith("late-reset"):
        layer.reset_magnitude()
    elif name == "late-merged-weight":
        layer.merged_weight()
    elif name == "late-merge":
        merge_adapter(model)


def _with(**extra: nn.Module | nn.Parameter) -> nn.Module:
    """A stack with something of its own, which the root has."""
    model = build(Stack())
    for name, it in extra.items():
        setattr(model, name, it)
    return model


def unlike(*, rank: int, world: int, strategy: str, what: str) -> str:
    """What is said where the last rank's model is another."""
    model = build(Stack(quant=QuantConfig() if what == "absmax" else None))
    base = next(module for module in model.modules() if isinstance(module, DoraLinear)).base
    if rank == world - 1 and what == "more":
        model.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
    elif rank == world - 1:
        getattr(base, what).data.flatten()[0] += 1
    try:
        shard_model(model, ShardConfig(strategy=strategy))
    except DoraError as error:
        return f"{type(error).__name__}: {error}"
    return ""


_UNSHARDABLE = {
    "storage-against-wire": (lambda: build(Stack(quant=QuantConfig())), {"param_dtype": torch.float16}),
    "integer-storage": (lambda: build(Stack(quant=QuantConfig(quant_storage=torch.uint8))), {}),
    "wire-changes-weight": (lambda: build(Stack()), {"param_dtype": BF16}),
    "mixed-root": (
        lambda: _with(
            extra=nn.Linear(2, 2).requires_grad_(False), other=nn.Linear(2, 2).to(BF16).requires_grad_(False)
        ),
        {},
    ),
    "mixed-training": (lambda: _with(extra=nn.Linear(2, 2), other=nn.Linear(2, 2).to(BF16)), {}),
    "trained-scalar": (lambda: _with(extra=nn.Parameter(torch.tensor(1.0))), {}),
    "no-adapter": (lambda: onehot.Net(Stack()), {}),
}
"""What makes a model, and how it is to be sharded, that no strategy takes."""


def trained_names(*, rank: int, world: int, strategy: str) -> set[str]:
    """The last words of the names of what trains, as the optimizer's groups may be built by."""
    del rank, world
    model = shard_model(build(Stack()), ShardConfig(strategy=strategy))
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def materialized(*, rank: int, world: int, folder: str, load: str) -> dict[str, torch.Tensor]:
    """The parameters of the plain model that this rank starts from the folder of its number."""
    del world
    model = materialize(Path(folder) / str(rank), None, load=load)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def warned(*, rank: int, world: int, strategy: str) -> list[str]:
    """What sharding warns of."""
    del rank, world
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shard_model(build(Stack()), ShardConfig(strategy=strategy))
    return [str(warning.message) for warning in caught]


def group_counts(*, rank: int, world: int, strategy: str) -> list[int]:
    """How many process groups there are after each of three models has been sharded."""
    del rank, world
    counts = []
    for _ in range(3):
        shard_model(build(Stack()), ShardConfig(strategy=strategy, shard_size=2))
        counts.append(len(distributed.distributed_c10d._world.pg_map))
    return counts


class _Counter(TorchDispatchMode):
    """How often this rank gathers, and reduces by any collective."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"gathers": 0, "reductions": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count it, and run it."""
        if func.namespace in {"c10d", "_c10d_functional"}:
            name = func.__name__.replace("_", "")
            self.counts["gathers"] += "allgather" in name
            self.counts["reductions"] += "reducescatter" in name or "allreduce" in name
        return func(*args, **(kwargs or {}))


def collectives(
    *, rank: int, world: int, strategy: str, units: str, wire: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Those of a step, counted and as preflight has them."""
    del rank
    dora = DoraConfig(2, 4, compute_dtype=BF16 if wire else None)
    config = ShardConfig(strategy=strategy, units=units, param_dtype=BF16 if wire else None)
    planned = preflight(_Blocks(nn.LayerNorm(6)), config, world_size=world, dora=dora).costs
    model = shard_model(apply_dora(_Blocks(nn.LayerNorm(6)), dora), config)
    model(torch.ones(3, 6)).sum().backward()
    with _Counter() as counter:
        model(torch.ones(3, 6)).sum().backward()
    return counter.counts, {"gathers": planned.gathers, "reductions": planned.reductions}


def kernels(*, rank: int, world: int) -> str:
    """What multiplies on this rank, where each machine would choose otherwise."""
    del world
    kept, products._of_this_machine = products._of_this_machine, lambda: "torch" if rank else "onednn"
    try:
        shard_model(build(Stack()), ShardConfig("fsdp2"))
        return products.float32_kernel()
    finally:
        products._of_this_machine = kept
        products._agreed.clear()


def started_alike(*, rank: int, world: int, strategy: str) -> list[tuple[str, list[float]]]:
    """What each rank holds of the adapters where each drew them with a seed of its own."""
    del world
    plain = onehot.Net(Stack())
    torch.manual_seed(rank)
    model = shard_model(apply_dora(plain, DoraConfig(2, 4)), ShardConfig(strategy=strategy))
    return [
        (shard.name, str(shard.index), shard.tensor.flatten().tolist())
        for shard in local_shards(model)
        if shard.kind == "parameter" and "lora_A" in shard.name
    ]


def frozen_scalar(*, rank: int, world: int, strategy: str) -> list[float]:
    """A frozen scalar, as CLIP's scale of logits, before and after a step."""
    del rank, world
    model = shard_model(
        _with(extra=nn.Parameter(torch.tensor(3.0), requires_grad=False)), ShardConfig(strategy=strategy)
    )
    model(torch.randn(4, 66)).sum().backward()
    return [float(shard.tensor) for shard in local_shards(model) if shard.name == "extra"]
