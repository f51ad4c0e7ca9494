"""Memory per rank and bytes on the wire, from a plan of units alone.

Clauses: S1, S2, S3, S9 (who holds and sends what), D11 (adapters travel and train in float32).

An all-gather or a reduce-scatter over n ranks sends and receives (n - 1) / n of the whole, padding included; an
all-reduce twice that.
A unit is gathered before its forward and again before its backward; the root stays whole in between, and a bias makes
no output that needs a gradient. Rank 0 holds the largest shards, so it is the one that is counted.
"""

from dataclasses import asdict, dataclass

from torch_impl.config import REPLICATED, ShardConfig
from torch_impl.units import Plan, Unit, shard_numel

OPTIMIZER_COPIES = 2
"""AdamW's two moments, each as large as what trains."""


@dataclass(frozen=True)
class Costs:
    """What one rank holds, and what a training step sends; all in bytes."""

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
    """The most that is gathered at one time: the root, a block's own parameters, two layers (one is prefetched)."""
    decoded: int
    """The largest dequantised weight, where bases are packed."""
    activations: int
    """The most that forward and backward hold, as rehearsed; 0 where no tokens were given, or none could be."""
    at_peak: int
    """Shards, buffers, moments, what is gathered, and the activations: an estimate of a step's fullest moment."""
    wire: int
    """Bytes that a rank sends in one step without accumulation; it receives as many."""

    def to_json(self) -> dict[str, int]:
        """As a mapping."""
        return asdict(self)


def costs(plan: Plan, shard: ShardConfig, *, world_size: int, size: int, activations: int = 0) -> Costs:
    """Count one strategy.

    Args:
        plan: the units.
        shard: the strategy.
        world_size: ranks.
        size: ranks that share one copy of the parameters (`torch_impl.sharding.shard_size`).
        activations: what forward and backward hold (`torch_impl.rehearsal`), decoded weights and the adapters' whole
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
    )


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
    """Root, largest block, and the two largest layers (base and adapter of one are gathered together); or all units."""
    if not shard.reshard_after_forward:
        return sum(unit.wire_bytes() for unit in plan.units)
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
    """A dequantised weight in a two-byte dtype; nothing for a dense base."""
    if unit.weight_shape is None or unit.members[0].kind != "packed":
        return 0
    return unit.weight_shape[0] * unit.weight_shape[1] * 2


def _whole_bytes(unit: Unit, shard: ShardConfig, *, size: int, gradients: bool = False) -> int:
    """Bytes of a gathered unit, or of the gradients that are reduced, padding included."""
    flat = shard.strategy.startswith("fsdp1")
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
    across = 2 * reduced // size * (replicas - 1) // replicas if shard.strategy in ("ddp", *REPLICATED) else 0
    if size == 1:
        return across
    gathers = 1 if unit.rule in ("root", "bias") or not shard.reshard_after_forward else 2
    return (gathers * _whole_bytes(unit, shard, size=size) + reduced) * (size - 1) // size + across
