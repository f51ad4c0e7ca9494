"""How fine the proof is: for each clause, compute dtype and strategy the smallest uniform error that would have failed.

A bitwise comparison sees one unit in the last place of what it compares; a bounded one sees what exceeds its limits.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from parity.case import Case
from parity.report.results import Results

Scales = dict[tuple[str, str], dict[str, float]]
"""By (clause, compute dtype), then strategy: a relative error."""
_ORDER = ("none", "fsdp1", "fsdp1-orig", "fsdp1-hybrid", "fsdp2", "hsdp", "ddp", "shard-map", "mesh")
EXACT = 0.0
"""Every changed bit is seen."""


def scales(results: Results) -> Scales:
    """From the checks that could have failed."""
    found: Scales = {}
    for clause, case, scale in _seen(results):
        cell = found.setdefault((clause, case.compute), {})
        strategy = _column(case)
        cell[strategy] = min(scale, cell.get(strategy, float("inf")))
    return dict(sorted(found.items(), key=lambda item: (item[0][0][0], int(item[0][0][1:]), item[0][1])))


def _seen(results: Results) -> Iterator[tuple[str, Case, float]]:
    for result in results.cases:
        if result.case.link == "controls":
            continue
        for check in result.counted:
            if check.kind == "loss":
                continue  # summed in float64 from outputs that are shown beside it
            scale = EXACT if check.detects is None else check.detects
            for clause in check.clauses:
                yield clause, result.case, scale


def _column(case: Case) -> str:
    return "mesh" if case.strategy.startswith("mesh-") else case.strategy


def show_scales(results: Results, console: Console) -> None:
    """One row a clause and compute dtype; an empty cell says that nothing was shown there."""
    found = scales(results)
    columns = [name for name in _ORDER if any(name in cell for cell in found.values())]
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("clause", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("-", "-\n"), justify="right", vertical="bottom", no_wrap=True)
    for (clause, compute), cell in found.items():
        table.add_row(f"{clause:4} {compute}", *(_said(cell.get(name)) for name in columns))
    console.print()
    console.print(
        "the smallest relative error that was seen, or would have been; 'bits': each changed bit", highlight=False
    )
    console.print(table)


def _said(scale: float | None) -> str:
    if scale is None:
        return ""
    digits, _, exponent = f"{scale:.0e}".partition("e")
    return "bits" if scale == EXACT else f"{digits}e{int(exponent)}"
