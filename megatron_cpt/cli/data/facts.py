"""How facts are shown: a table of two columns, texts below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

_SHOWN = 5  # entries of a list


def show_facts(value: Mapping[str, Any]) -> RenderableType:
    """A table of the facts; the texts of a document or sample below, each piece after a rule."""
    table = Table(show_header=False, box=None)
    parts: list[RenderableType] = [table]
    for name, fact in value.items():
        if name in ("document", "sample"):
            parts += [Rule(f"{name} {fact['number']}"), show_facts({k: v for k, v in fact.items() if k != "number"})]
        elif name == "pieces" and isinstance(fact, list):
            for piece in fact:
                source = f"document {piece['document']:,}" + (f" of {piece['file']}" if piece["file"] else "")
                parts += [Rule(f"{piece['tokens']} tokens, {source}"), Text(piece["text"])]
        elif name == "text":
            parts.append(Text(fact))
        elif name == "origin":
            table.add_row(name, Text(f"{fact['path']}:{fact['line']} (id {fact['id']!r})"))
        elif name == "sources":
            table.add_row(name, Text("\n".join([*map(_source, fact[:_SHOWN]), *_more(fact)])))
        elif name != "ids" and fact not in ({}, None, ""):
            table.add_row(name, Text("\n".join(_lines(fact))))
    return Group(*parts)


def _source(source: Mapping[str, Any]) -> str:
    return (
        f"{source['path']}: {source['documents']:,} documents, {source['tokens']:,} tokens, "
        f"{source['bytes_per_token']:.2f} bytes a token, {source['byte_token_share']:.2%} of the tokens are bytes"
    )


def _more(entries: Sequence[Any]) -> list[str]:
    return [f"... and {len(entries) - _SHOWN:,} more"] if len(entries) > _SHOWN else []


def _lines(fact: Any) -> list[str]:
    """A fact in words: numbers with separators, hashes cut, one line for each entry of what holds others."""
    if isinstance(fact, Mapping):
        return [f"{name}: {', '.join(_lines(value))}" for name, value in fact.items() if value not in ("", None)]
    if isinstance(fact, Sequence) and not isinstance(fact, str):
        return [", ".join(_lines(entry)) for entry in fact[:_SHOWN]] + _more(fact)
    if isinstance(fact, bool):
        return ["yes" if fact else "no"]
    if isinstance(fact, int):
        return [f"{fact:,}"]
    if isinstance(fact, float):
        return [f"{fact:.4g}"]
    text = str(fact)
    is_hash = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return [f"{text[:12]}..." if is_hash else text]
