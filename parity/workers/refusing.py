"""What an implementation says of what it is to refuse (Q7, Q8, C1, C3, C4)."""

from __future__ import annotations

from typing import Any

from parity.case import Case


def what_is_said(implementation: Any, case: Case) -> str:
    """The error's class and text; empty where the bad thing was taken.

    Raises:
        Exception: whatever the implementation raises on the sound thing: then it refuses too much.
    """
    implementation.meet(case, bad=False)
    try:
        implementation.meet(case, bad=True)
    except Exception as error:  # noqa: BLE001 - any class may be a refusal; the words decide
        return f"{type(error).__name__}: {error}"
    return ""
