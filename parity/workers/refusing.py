"""What an implementation says of what it is to refuse (Q7, Q8, C1, C3, C4)."""

from __future__ import annotations

from typing import Any

from parity.case import Case, RefuseCase
from parity.printable import printable


def why_refused(implementation: Any, case: Case) -> str:
    """Why an implementation does not take a case, fit to be shown; empty where it takes it.

    Raises:
        TypeError: the reason is no text.
    """
    reason = implementation.refuses(case)
    if reason is not None and not isinstance(reason, str):
        raise TypeError(f"refuses gave a {type(reason).__name__}, wanted a reason or None")
    return printable(str(reason or ""))


def what_is_said(implementation: Any, case: RefuseCase) -> str:
    """The error's class and text; empty where the bad thing was taken.

    Raises:
        Exception: whatever the implementation raises on the sound thing: then it refuses too much.
    """
    implementation.meet(case, bad=False)
    try:
        implementation.meet(case, bad=True)
    except Exception as error:  # noqa: BLE001 - any class may be a refusal; the words decide
        return printable(f"{type(error).__name__}: {error}")
    return ""
