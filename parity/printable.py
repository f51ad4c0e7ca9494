"""Text of an implementation, made fit to be shown: one line, printable, of bounded length."""

from __future__ import annotations

LONGEST = 1000
"""Characters of a reason or a name."""


def printable(text: str, limit: int = LONGEST) -> str:
    r"""The text on one line, with `?` for what a terminal would obey rather than show, cut at the limit.

    >>> printable("one\n  two \x1b[31m red")
    'one two ?[31m red'
    """
    kept = text[: 4 * limit]  # first: who writes a million letters has no hold on our time
    line = " ".join("".join(letter if _is_plain(letter) else "?" for letter in kept).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _is_plain(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\r\t\v\f"
