"""Memory per rank and bytes on the wire, from a plan of units alone.

Clauses: S1, S2, S3, S9 (who holds and sends what), D11 (adapters travel and train in float32).

An all-gather or a reduce-scatter over n ranks sends and receives (n - 1) / n of the whole, padding included; an
all-reduce twice that.
A unit is gathered before its forward and again before its backward; the root stays whole in between, and a bias makes
no output that needs a gradient. Rank 0 holds the largest shards, so it is the one that is counted.
"""

import math
from dataclasses import asdict, dataclass

from torch_impl.config import ShardConfig
from torch_impl.sharding.units import Plan, Unit, shard_numel

OPTIMIZER_COPIES = 2
"""AdamW's two moments, each as large as what trains."""
DDP_BUCKET = 25 * 2**20
"""Bytes of gradients that DDP reduces together, torch's default."""


@dataclass(frozen=True)
class Costs:
    """What one rank holds, and what a training step sends, in bytes; and how often it does."""

    parameters: int
    """Its shards of all parameters, as stored."""
    buffers: int
    """Quant states and other buffers, whole on every rank (S6)."""
    gradients: int
    """Its shards of the gradients."""
    optimizer: int
    """Its shards of AdamW's two moments."""
    at_rest: int
    """The four above: between steps, with gradients kept."""
    gathered: int
    """The most that is gathered at one time: the root, and two blocks or layers, of which one is prefetched."""
    decoded: int
    """The largest dequantised weight, where bases are packed."""
    activations: int
    """The most that forward and backward hold, as rehearsed; 0 where no tokens were given, or none could be."""
    at_peak: int
    """Shards, buffers, moments, what is gathered, and the activations: an estimate of a step's fullest moment."""
    wire: int
    """Bytes that a rank sends in one step without accumulation; it receives as many."""
    gathers: int
    """All-gathers of one step."""
    reductions: int
    """Reduce-scatters and all-reduces of one step."""
    group: int
    """Ranks of the smallest group that any of them is over: a row of the mesh, or its replicas."""

    def to_json(self) -> dict[str, int]:
        """The bytes, as a mapping."""
        counts = ("gathers", "reductions", "group")
        return {name: value for name, value in asdict(self).items() if name not in counts}


def costs(plan: Plan, shard: ShardConfig, *, world_size: int, size: int, activations: int = 0) -> Costs:
    """Count one strategy.

    Args:
        plan: the units.
        shard: the strategy.
        world_size: ranks.
        size: ranks that share one copy of the parameters (`torch_impl.sharding.meshes.shard_size`).
        activations: what forward and backward hold (`rehearsal`), decoded weights and the adapters' whole
            gradients included; 0 leaves them out.

    Returns:
        Rank 0's bytes.
    """
    held = [_shard_bytes(unit, shard, size=size) for unit in plan.units]
    trained = [_shard_bytes(unit, shard, size=size, trainable=True) for unit in plan.units]
    parameters, gradients = sum(held), sum(trained)
    at_rest = parameters + plan.buffer_bytes + gradients * (1 + OPTIMIZER_COPIES)
    gathered = _gathered(plan, shard) if size > 1 else 0
    decoded = max((_decoded(unit) for unit in plan.units), default=0)
    kept = at_rest - gradients  # there are none until the backward pass
    return Costs(
        parameters=parameters,
        buffers=plan.buffer_bytes,
        gradients=gradients,
        optimizer=gradients * OPTIMIZER_COPIES,
        at_rest=at_rest,
        gathered=gathered,
        decoded=decoded,
        activations=activations,
        at_peak=kept + gathered + (activations or decoded + gradients),
        wire=sum(_wire(unit, shard, world_size=world_size, size=size) for unit in plan.units),
        gathers=sum(_gathers(unit, shard) for unit in plan.units) if size > 1 else 0,
        reductions=_reductions(plan, shard, world_size=world_size, size=size),
        group=min((ranks for ranks in (size, world_size // size) if ranks > 1), default=1),
    )


@dataclass(frozen=True)
class Link:
    """What joins two ranks."""

    latency: float = 20e-6
    """Seconds until the first byte of a message has arrived."""
    bandwidth: float = 25e9
    """Bytes a second, each way."""


def least_seconds(costs: Costs, link: Link) -> float:
    """What the collectives of a step take at least, one after the other, of what can hide behind computation and not.

    Nothing that depends on all of n ranks is known anywhere before `ceil(log2 n)` messages, one after the other.
    """
    rounds = (costs.gathers + costs.reductions) * math.ceil(math.log2(costs.group))
    return rounds * link.latency + costs.wire / link.bandwidth


def _shard_bytes(unit: Unit, shard: ShardConfig, *, size: int, trainable: bool = False) -> int:
    """Bytes that rank 0 holds of a unit; of its trainable members alone, where asked."""
    members = tuple(m for m in unit.members if m.trainable or not trainable)
    if not members:
        return 0
    part = Unit(unit.name, unit.rule, members, unit.wire)
    widest = max(m.dtype.itemsize for m in members)
    if len({m.dtype for m in members}) == 1:
        return shard_numel(part, shard.strategy, size=size, rank=0) * widest
    alone = [Unit(unit.name, unit.rule, (m,), unit.wire) for m in members]
    return sum(shard_numel(u, shard.strategy, size=size, rank=0) * u.members[0].dtype.itemsize for u in alone)


def _gathered(plan: Plan, shard: ShardConfig) -> int:
    """Root and the two largest blocks, of which one is prefetched; or all units.

    Cut by layers, root, the largest block's rest, and the two largest layers (base and adapter of one come together).
    """
    if not shard.reshard_after_forward:
        return sum(unit.wire_bytes() for unit in plan.units)
    if shard.unit_rule == "block":
        blocks: dict[str, int] = {}
        for unit in plan.units:
            blocks[unit.name] = blocks.get(unit.name, 0) + unit.wire_bytes()
        return blocks.pop("", 0) + sum(sorted(blocks.values())[-2:])
    by_rule: dict[str, list[int]] = {"root": [0], "block": [0]}
    layers: dict[str, int] = {}
    for unit in plan.units:
        if unit.rule in by_rule:
            by_rule[unit.rule].append(unit.wire_bytes())
        else:
            name = unit.name if unit.rule == "adapter" else unit.name.rpartition(".")[0]
            layers[name] = layers.get(name, 0) + unit.wire_bytes()
    return max(by_rule["root"]) + max(by_rule["block"]) + sum(sorted(layers.values())[-2:])


def _decoded(unit: Unit) -> int:
    """A unit's largest dequantised weight in a two-byte dtype; nothing for dense ones."""
    packed = (m.decoded_shape for m in unit.members if m.kind == "packed" and m.decoded_shape)
    return max((2 * rows * row for rows, row in packed), default=0)


def _whole_bytes(unit: Unit, shard: ShardConfig, *, size: int, gradients: bool = False) -> int:
    """Bytes of a gathered unit, or of the gradients that are reduced, padding included."""
    flat = shard.how.flat
    trained = tuple(m for m in unit.members if m.trainable)
    if gradients and not trained:
        return 0
    members = trained if gradients and not flat else unit.members
    if flat and len({m.dtype for m in members}) == 1:
        itemsize = (unit.wire or members[0].dtype).itemsize
        return size * shard_numel(unit, shard.strategy, size=size, rank=0) * itemsize
    alone = [Unit(unit.name, unit.rule, (m,), unit.wire) for m in members]
    return sum(
        size * shard_numel(u, shard.strategy, size=size, rank=0) * (u.wire or u.members[0].dtype).itemsize
        for u in alone
    )


def _wire(unit: Unit, shard: ShardConfig, *, world_size: int, size: int) -> int:
    """Bytes a rank sends for one unit in one step."""
    replicas = world_size // size
    reduced = _whole_bytes(unit, shard, size=size, gradients=True)
    across = 2 * reduced // size * (replicas - 1) // replicas if shard.how.replicates else 0
    if size == 1:
        return across
    return (_gathers(unit, shard) * _whole_bytes(unit, shard, size=size) + reduced) * (size - 1) // size + across


def _gathers(unit: Unit, shard: ShardConfig) -> int:
    """How often a step gathers a unit: FSDP1 needs a bias in the forward alone, and every root stays whole."""
    if not unit.members:
        return 0
    once = unit.rule == "root" or not shard.reshard_after_forward
    return 1 if once or (unit.rule == "bias" and shard.how.flat) else 2


def _reductions(plan: Plan, shard: ShardConfig, *, world_size: int, size: int) -> int:
    """One a unit that has gradients, and one more where replicas add theirs; DDP's buckets."""
    if world_size == 1 or shard.how.alone:
        return 0
    trained = [unit for unit in plan.units if any(m.trainable for m in unit.members)]
    if not shard.how.cuts:
        return -(-sum(m.nbytes for unit in trained for m in unit.members if m.trainable) // DDP_BUCKET)
    return len(trained) * ((size > 1) + (world_size > size))
