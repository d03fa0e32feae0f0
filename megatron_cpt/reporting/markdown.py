"""Pieces of a page: tables, code, numbers for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, columns of numbers to the right; nothing but its head where there are no rows."""
    numbers = [
        bool(rows) and all(re.match(r"[-+]?\d|<|-$", row[column]) for row in rows) for column in range(len(head))
    ]
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---:' if number else '---' for number in numbers)}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def code(text: str) -> str:
    """A text as code, what cannot be seen spelt out."""
    shown = "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" for c in text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[:1] in ("`", " ") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}" if shown else "(nothing)"


def percent(share: float) -> str:
    """A share of 1 in per cent."""
    if not share:
        return "0 %"
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def binary_size(size: float) -> str:
    """Bytes in KiB, MiB, GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
