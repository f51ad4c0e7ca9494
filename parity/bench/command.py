"""`dora-parity bench`: choose rows, measure them group by group, show and write them."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parity.bench.groups import GROUPS, measure
from parity.bench.measure import Row
from parity.bench.picture import draw
from parity.errors import CannotRun, NoCaseMatches
from parity.report.environment import describe
from parity.report.results import write_json
from torch_impl.layers.products import float32_kernel

SCHEMA = 1


def run_bench(keep: str, json: Path | None, plot: Path | None, console: Console) -> int:
    """Measure the rows that match; 0 where each limit holds, 1 where one does not.

    Raises:
        CannotRun: nothing matches, a group cannot be measured, or a file cannot be written.
    """
    chosen = choose(keep)
    rows: list[Row] = []
    environment = describe("cpu") | {"float32_product": float32_kernel()}
    _write(json, environment, rows, complete=False)  # a place that cannot be written is known at once
    if plot:
        draw(rows, plot)
    for group, names in chosen.items():
        console.print(f"{group}: {', '.join(names)}", style="dim")
        for row in measure(group):
            if row.name in names:
                rows.append(row)
                console.print(f"  {row.name} {row.ratio:.3f} of {row.limit:.3f}", highlight=False)
                _write(json, environment, rows, complete=False)
    missing = {name for names in chosen.values() for name in names} - {row.name for row in rows}
    if missing:
        raise CannotRun(f"no measurement of {', '.join(sorted(missing))}", hint="report it")
    _write(json, environment, rows, complete=True)
    if plot:
        draw(rows, plot)
    console.print(table(rows))
    return 0 if all(row.holds for row in rows) else 1


def choose(keep: str) -> dict[str, tuple[str, ...]]:
    """Of each group the rows whose name contains `keep`.

    Raises:
        NoCaseMatches: none does.
    """
    found = {group: tuple(name for name in names if keep in name) for group, names in GROUPS.items()}
    chosen = {group: names for group, names in found.items() if names}
    if not chosen:
        rows = ", ".join(name for names in GROUPS.values() for name in names)
        raise NoCaseMatches(f"-k {keep!r} matches no row", hint=f"there are {rows}")
    return chosen


def table(rows: list[Row]) -> Table:
    """All rows, for the terminal."""
    shown = Table("ours / peer", box=None, header_style="bold")
    for title in ("ours", "peer", "ratio", "limit", ""):
        shown.add_column(title, justify="right")
    for row in rows:
        verdict = "holds" if row.holds else "[red]falls short[/red]"
        shown.add_row(
            row.name, amount(row.ours_s, row.unit), amount(row.peer_s, row.unit),
            f"{row.ratio:.3f}", f"{row.limit:.3f}", verdict,
        )  # fmt: skip
    return shown


def amount(value: float, unit: str) -> str:
    """Seconds or bytes, in a reader's units."""
    if unit == "B":
        return f"{value / 2**20:.0f} MiB"
    if not unit:
        return f"{value:g}"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _write(place: Path | None, environment: dict[str, Any], rows: list[Row], *, complete: bool) -> None:
    if place is None:
        return
    content = {"schema": SCHEMA, "environment": environment, "complete": complete, "rows": [r.as_json() for r in rows]}
    try:
        write_json(place, content)
    except OSError as error:
        raise CannotRun(f"--json {place} cannot be written: {error.strerror}", hint="name another file") from error
