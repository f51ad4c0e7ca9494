"""`dora-parity list --matrix`: which values of which factors stand together in a case, and which cannot, and why."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from parity.cases.covering import ARRAYS, Array


def show_matrix(console: Console) -> None:
    """Each array: its factors, how many rows hold every pair, and the holes with their reasons."""
    for array in ARRAYS:
        _show(array, console)


def _show(array: Array, console: Console) -> None:
    console.print(f"[bold]{escape(array.name)}[/]: every pair of values in {len(array.rows())} cases", soft_wrap=True)
    for name, values in array.factors.items():
        console.print(f"  {name:14} {escape(', '.join(map(str, values)))}", soft_wrap=True)
    for one, other, reason in array.holes():
        console.print(f"  no {escape(one)} with {escape(other)}: {escape(reason)}", soft_wrap=True)
    console.print()
