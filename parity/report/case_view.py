"""`dora-parity show`: one case, whole."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parity.case import Case, StackCase
from parity.inputs import deal_tokens, stack_inputs


def show_case(case: Case, console: Console) -> None:
    """Its fields, its arrays with shapes, how its tokens are dealt, and how to replay it."""
    console.print(f"[bold]{escape(case.id)}[/]", soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ("task", "model", "tolerance"):
        table.add_row(name, str(getattr(case, name)))
    for field in dataclasses.fields(case):
        table.add_row(field.name, escape(str(getattr(case, field.name))))
    console.print(table)
    dealt = ", ".join(f"rank {rank}: {part.start}:{part.stop}" for rank, part in enumerate(_dealt(case)))
    console.print(f"tokens       {dealt}", soft_wrap=True)
    if isinstance(case, StackCase):
        for name, array in stack_inputs(case).items():
            console.print(f"input        {name} {array.shape}")
    console.print(f"replay       dora-parity run -k '{escape(case.id)}'", soft_wrap=True)


def _dealt(case: Case) -> list[slice]:
    return deal_tokens(case.tokens, case.input_world)
