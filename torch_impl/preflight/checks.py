"""The checks of `preflight`: each looks at a scene, a model and the units it would be cut into, and yields findings.

Clauses: D1, D6, D11, S1, S2, S6, S7, S8, T1, each named in the finding that its check makes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_impl.config import DoraConfig, ShardConfig
from torch_impl.errors import DoraError, RankError
from torch_impl.inject import refuse_target, target, target_names
from torch_impl.layers.dora import DoraLayer
from torch_impl.preflight.findings import Finding
from torch_impl.sharding.units import Member, Plan, Unit, shard_numel

MUCH_PADDING = 2.0
"""Elements gathered over elements there are, above which it is worth another strategy."""


@dataclass(frozen=True)
class Scene:
    """What every check looks at."""

    model: nn.Module
    plan: Plan
    shard: ShardConfig
    world_size: int
    size: int
    dora: DoraConfig | None
    seq_len: int

    @property
    def flat(self) -> bool:
        """Whether units are flat parameters."""
        return self.shard.how.flat


def _unit_name(unit: Unit) -> str:
    """A unit in words."""
    return f"{unit.rule} unit" if unit.name == "" or unit.rule != "block" else "block's unit"


def _groups(members: tuple[Member, ...], key: Callable[[Member], Any]) -> dict[Any, list[Member]]:
    """Members by what `key` says of them."""
    groups: dict[Any, list[Member]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def _dtype_groups(scene: Scene) -> Iterator[Finding]:
    """S7: one dtype in a flat parameter, one among the trainable members of an FSDP2 group."""
    if not scene.shard.how.cuts:
        return
    for unit in scene.plan.units:
        members = unit.members if scene.flat else tuple(m for m in unit.members if m.trainable)
        groups = _groups(members, lambda m: m.dtype)
        if len(groups) > 1:
            odd = next((m for m in unit.members if m.trainable), min(groups.values(), key=len)[0])
            names = " and ".join(sorted(str(dtype) for dtype in groups))
            says = f'"Must flatten tensors with uniform dtype", {names}' if scene.flat else f"{names} train together"
            yield Finding(
                "error",
                odd.name,
                "S7",
                f"the {_unit_name(unit)} mixes dtypes: {scene.shard.strategy} raises ({says})",
                "give frozen weights, adapters and norms units of one dtype each, as apply_dora and shard_model do",
            )


def _gradient_groups(scene: Scene) -> Iterator[Finding]:
    """S7: one requires_grad in a flat parameter without use_orig_params."""
    if not scene.shard.how.flat or scene.shard.how.keeps_originals:
        return
    for unit in scene.plan.units:
        groups = _groups(unit.members, lambda m: m.trainable)
        if len(groups) > 1:
            odd = min(groups.values(), key=len)[0]
            yield Finding(
                "error",
                odd.name,
                "S7",
                f'the {_unit_name(unit)} mixes frozen and trainable members: fsdp1 raises ("uniform `requires_grad`")',
                "give the adapter a unit of its own, as shard_model does, or use fsdp2",
            )


def _integers(scene: Scene) -> Iterator[Finding]:
    """S7: no integer dtype in a flat parameter."""
    if scene.flat:
        for unit in scene.plan.units:
            for member in unit.members:
                if not member.dtype.is_floating_point:
                    yield Finding(
                        "error",
                        member.name,
                        "S7",
                        f"{member.dtype} bytes can't lie in a flat parameter",
                        "use quant_storage=torch.bfloat16, or fsdp2",
                    )


def _storage(scene: Scene) -> Iterator[Finding]:
    """S6: packed bytes are never cast on the wire."""
    dtype = scene.shard.param_dtype
    if dtype is None or not scene.shard.how.cuts:
        return
    for unit in scene.plan.units:
        for member in unit.members:
            if member.kind == "packed" and member.dtype.is_floating_point and member.dtype != dtype:
                yield Finding(
                    "error",
                    member.name,
                    "S6",
                    f"quant_storage {member.dtype} against param_dtype {dtype}: the bytes would be cast on the wire "
                    "and decode to finite garbage",
                    f"use quant_storage={dtype}, or leave param_dtype unset",
                )


def _used_weight(scene: Scene) -> Iterator[Finding]:
    """D6: the wire must not change the weight that the magnitude was made from."""
    dtype = scene.shard.param_dtype
    if dtype is None or not scene.shard.how.cuts:
        return
    live = {f"{n}.base.weight": m.compute_dtype for n, m in scene.model.named_modules() if isinstance(m, DoraLayer)}
    for weight in (member for unit in scene.plan.units for member in unit.members if member.kind == "weight"):
        planned = (scene.dora.compute_dtype if scene.dora else None) or weight.dtype
        if dtype not in (weight.dtype, live.get(weight.name, planned)):
            yield Finding(
                "error",
                weight.name,
                "D6",
                f"param_dtype {dtype} changes a weight that is {weight.dtype}: its norms would not be its magnitudes",
                f"use compute_dtype={dtype}",
            )


def _outside(scene: Scene) -> Iterator[Finding]:
    """S8: parameters are read inside the forward of the module that owns them."""
    if not scene.shard.how.cuts:
        return
    for name, module in scene.model.named_modules():
        if isinstance(module, nn.ParameterDict | nn.ParameterList):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield Finding(
                        "error",
                        f"{name}.{leaf}",
                        "S8",
                        f"a {type(module).__name__} has no forward: what reads it gets a shard, or a stale view",
                        "make it a parameter of the layer whose forward uses it",
                    )
    if scene.shard.how.keeps_originals:
        yield from _peft_outside(scene)


def _peft_outside(scene: Scene) -> Iterator[Finding]:
    """S8: peft's DoRA takes `lora_A.weight` and `lora_B.weight` from outside their modules (peft#1737)."""
    for name, module in scene.model.named_modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if isinstance(magnitudes, nn.ModuleDict):
            for adapter in magnitudes:
                yield Finding(
                    "error",
                    f"{name}.lora_magnitude_vector.{adapter}.weight",
                    "S8",
                    "peft reads lora_A.weight and lora_B.weight from outside; where they are units, as under its own "
                    "wrap policy, they are flat shards there (IndexError)",
                    "use apply_dora, make whole blocks units, or leave use_orig_params",
                )


def _on_meta(scene: Scene) -> Iterator[Finding]:
    """S8: everything has a place in memory before it is sharded."""
    named = list(scene.model.named_parameters())
    if all(parameter.is_meta for _, parameter in named):
        return
    for name, parameter in named:
        if parameter.is_meta:
            magnitude = "magnitude" in name
            yield Finding(
                "error",
                name,
                "D6" if magnitude else "S8",
                "still on the meta device: " + ("the magnitude has no value" if magnitude else "it holds no weight"),
                "call reset_magnitude() before shard_model" if magnitude else "load it before shard_model",
            )


def _ties(scene: Scene) -> Iterator[Finding]:
    """S7: a parameter belongs to one unit."""
    if not scene.shard.how.cuts:
        return
    for first, second in scene.plan.tied:
        yield Finding(
            "error",
            second,
            "S7",
            f"tied to {first} in another unit: each unit would hold and update its own",
            "untie them, or keep both modules in one unit",
        )


def _adapter_precision(scene: Scene) -> Iterator[Finding]:
    """D11: adapters are float32, also on the wire."""
    sharded = scene.shard.how.cuts
    for unit in scene.plan.units:
        for member in unit.members:
            wire = (unit.wire if sharded else None) or member.dtype
            if member.kind == "adapter" and member.trainable and wire.itemsize < torch.float32.itemsize:
                yield Finding(
                    "warning",
                    member.name,
                    "D11",
                    f"it is {member.dtype} and travels as {wire}: small updates are lost, and c starts off 1",
                    "keep adapters in float32, in units without param_dtype",
                )


def _replicas(scene: Scene) -> Iterator[Finding]:
    """T1: without a strategy ranks don't share gradients."""
    if scene.shard.how.alone and scene.world_size > 1:
        yield Finding(
            "error", "every parameter", "T1", "each rank would train a model of its own", "use ddp, fsdp1 or fsdp2"
        )


def _positions(scene: Scene) -> Iterator[Finding]:
    """T1: there is an embedding, or a rotation that was trained, for every position."""
    positions = getattr(getattr(scene.model, "config", None), "max_position_embeddings", None)
    if positions and scene.seq_len > positions:
        text = f"a sequence of {scene.seq_len} tokens is beyond the model's {positions} positions: train refuses it"
        yield Finding("error", "every position", "T1", text, f"use a seq_len of at most {positions}")


def _uneven(scene: Scene) -> Iterator[Finding]:
    """S1, S2: ranks with less than others, or nothing."""
    if scene.size == 1:
        return
    for unit in scene.plan.units:
        if scene.flat:
            last = shard_numel(unit, scene.shard.strategy, size=scene.size, rank=scene.size - 1)
            if unit.members and last * (scene.size - 1) >= sum(m.numel for m in unit.members):
                yield _uneven_finding(unit.members[0].name, "S2", f"the last of {scene.size} ranks holds padding alone")
            continue
        for member in unit.members:
            rows = -(-member.shape[0] // scene.size) if member.shape else 1
            full = -(-member.shape[0] // rows) if member.shape and rows else 1
            if full < scene.size:
                text = f"{scene.size - full} of {scene.size} ranks hold no row of its {member.shape[0]}"
                yield _uneven_finding(member.name, "S1", text)


def _padding(scene: Scene) -> Iterator[Finding]:
    """S1: FSDP2 gathers whole chunks, so that empty shards travel as padding."""
    if scene.flat or scene.size == 1:
        return
    real, sent = 0, 0
    worst: tuple[int, str] = (0, "")
    for member in (m for unit in scene.plan.units for m in unit.members if m.shape):
        padded = -(-member.shape[0] // scene.size) * scene.size * (member.numel // max(1, member.shape[0]))
        real, sent = real + member.numel, sent + padded
        worst = max(worst, (padded - member.numel, member.name))
    if sent > MUCH_PADDING * real:
        yield Finding(
            "warning",
            worst[1],
            "S1",
            f"{scene.shard.strategy} on {scene.size} ranks gathers {sent / real:.1f} times what there is: short "
            "parameters are padded to a row a rank",
            "use hsdp with a shard_size of at most the adapter's rank or so, or fsdp1",
        )


def _uneven_finding(name: str, clause: str, consequence: str) -> Finding:
    """Empty shards are right, and worth knowing."""
    return Finding("note", name, clause, consequence, "nothing to do; hsdp with a smaller shard_size evens it out")


def _refused(scene: Scene) -> Iterator[Finding]:
    """D1, D3, Q1: what `apply_dora` would refuse."""
    if scene.dora is None:
        return
    for name in target_names(scene.model, scene.dora):
        try:
            refuse_target(name, target(scene.model, name), scene.dora)
        except RankError:
            text = f"rank {scene.dora.rank} is larger than both of its sides: apply_dora refuses it"
            yield Finding("error", f"{name}.base.weight", "D1", text, "use a smaller rank")
        except DoraError as error:
            yield Finding("error", f"{name}.weight", "D3", f"apply_dora refuses it: {error.args[0]}", error.hint)


CHECKS: tuple[Callable[[Scene], Iterator[Finding]], ...] = (
    _dtype_groups,
    _gradient_groups,
    _integers,
    _storage,
    _used_weight,
    _outside,
    _on_meta,
    _ties,
    _adapter_precision,
    _replicas,
    _positions,
    _uneven,
    _padding,
    _refused,
)
