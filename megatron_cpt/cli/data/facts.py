"""How the facts of a dataset are shown."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text


def show_facts(value: dict[str, Any]) -> RenderableType:
    """A table of the facts; the texts of a document or sample below, each piece after a rule."""
    table = Table(show_header=False, box=None)
    parts: list[RenderableType] = [table]
    for name, fact in value.items():
        if name in ("document", "sample"):
            parts += [Rule(f"{name} {fact['number']}"), show_facts({k: v for k, v in fact.items() if k != "number"})]
        elif name == "pieces" and isinstance(fact, list):  # a pack has a number of them
            for piece in fact:
                source = f"document {piece['document']:,}" + (f" of {piece['file']}" if piece["file"] else "")
                parts += [Rule(f"{piece['tokens']} tokens, {source}"), Text(piece["text"])]
        elif name == "origin":
            table.add_row(name, Text(f"{fact['path']}:{fact['line']} (id {fact['id']!r})"))
        elif name == "text":
            parts.append(Text(fact))
        elif name == "sources":
            table.add_row(name, Text(f"{len(fact)}: " + ", ".join(source["path"] for source in fact[:3])))
        elif name != "ids":
            table.add_row(name, Text(f"{fact:,}" if type(fact) is int else str(fact)))
    return Group(*parts)
