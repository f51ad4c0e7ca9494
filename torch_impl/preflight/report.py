"""`preflight`: what will fail, or be silently wrong, before a weight is read.

Clauses: D6, D11, S1, S2, S6, S7, S8, T1, each named in the finding that it makes (`torch_impl.preflight.checks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torch_impl.config import DoraConfig, ShardConfig
from torch_impl.preflight.checks import CHECKS, Scene
from torch_impl.preflight.costs import Costs, Link, costs, least_seconds
from torch_impl.preflight.findings import LEVELS, Finding, merged
from torch_impl.preflight.rehearsal import rehearsed_peak
from torch_impl.sharding.meshes import shard_size
from torch_impl.sharding.units import Plan, plan_units


@dataclass(frozen=True)
class Report:
    """What `preflight` found of one strategy."""

    strategy: str
    world_size: int
    findings: tuple[Finding, ...]
    """Errors first."""
    plan: Plan
    costs: Costs
    units: dict[str, int] = field(default_factory=dict)
    """How many units each line of the rule made."""

    @property
    def ok(self) -> bool:
        """Whether training would neither fail nor be silently wrong."""
        return not any(finding.level == "error" for finding in self.findings)

    def least_seconds(self, link: Link) -> float:
        """What a step's collectives take at least over such links."""
        return least_seconds(self.costs, link)

    def to_json(self) -> dict[str, Any]:
        """As nested mappings."""
        return {
            "strategy": self.strategy,
            "world_size": self.world_size,
            "ok": self.ok,
            "findings": [vars(finding) for finding in self.findings],
            "units": self.units,
            "bytes": self.costs.to_json(),
            "collectives": {"gathers": self.costs.gathers, "reductions": self.costs.reductions},
            "parameters": {
                "total": self.plan.total,
                "trainable": self.plan.trainable,
                "percent": 100 * self.plan.trainable / max(1, self.plan.total),
            },
        }


def preflight(
    model: nn.Module,
    shard: ShardConfig,
    *,
    world_size: int = 2,
    dora: DoraConfig | None = None,
    batch_size: int = 1,
    seq_len: int = 0,
) -> Report:
    """Look at a model as `shard_model(model, shard)` would cut it; nothing is changed, gathered or read.

    Args:
        model: any module, PEFT's included, on any device. One that lies on the meta device as a whole is judged from
            shapes; on any other, a parameter still on meta is an error.
        shard: strategy and wire dtypes.
        world_size: ranks.
        dora: adapters that are to be put on first; None where the model has what it is to have.
        batch_size: sequences of one rank in one forward.
        seq_len: tokens of each, for the memory of a step; 0 leaves that out.

    Returns:
        The report: findings, the units, memory and wire.

    Raises:
        DoraError: `dora` can't be applied to the model at all, or the shard size doesn't divide the world.
    """
    return preflights(model, [shard], world_size=world_size, dora=dora, batch_size=batch_size, seq_len=seq_len)[0]


def preflights(
    model: nn.Module,
    shards: Sequence[ShardConfig],
    *,
    world_size: int,
    dora: DoraConfig | None = None,
    batch_size: int = 1,
    seq_len: int = 0,
) -> list[Report]:
    """`preflight` of several strategies; the step is rehearsed once, since what it holds is the same under each."""
    activations = rehearsed_peak(model, dora, sequences=batch_size, length=seq_len) if seq_len else None
    given = {"world_size": world_size, "dora": dora, "seq_len": seq_len, "activations": activations}
    return [_judged(model, shard, **given) for shard in shards]


def _judged(
    model: nn.Module,
    shard: ShardConfig,
    *,
    world_size: int,
    dora: DoraConfig | None,
    seq_len: int,
    activations: int | None,
) -> Report:
    """One strategy's report."""
    plan = plan_units(model, shard, dora)
    size = shard_size(shard, world_size=world_size)
    scene = Scene(model, plan, shard, world_size, size, dora, seq_len)
    found = [finding for check in CHECKS for finding in check(scene)]
    rules: dict[str, int] = {}
    for unit in plan.units:
        rules[unit.rule] = rules.get(unit.rule, 0) + 1
    return Report(
        strategy=shard.strategy,
        world_size=world_size,
        findings=tuple(sorted(merged(found), key=lambda finding: LEVELS.index(finding.level))),
        plan=plan,
        costs=costs(plan, shard, world_size=world_size, size=size, activations=activations or 0),
        units=rules,
    )
