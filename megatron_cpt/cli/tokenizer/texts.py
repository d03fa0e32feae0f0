"""What the commands of `tokenizer` share: files of text, and how facts are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megatron_cpt.data import Document

# An option of click takes one value; the files that follow it, as a shell's pattern leaves them, come as arguments.
MoreFiles = Annotated[list[Path] | None, typer.Argument(metavar="FILE", show_default=False, hidden=True)]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text.")]


def read_texts(files: list[Path], text_field: str, language: str, advance: Any) -> Iterator[str]:
    """The documents of corpus files, one after the other; `advance` is told (done, total)."""
    from megatron_cpt.data import read_documents

    documents: Iterable[Document] = read_documents(files, text_field, language, on_progress=advance) if files else ()
    return (document.text for document in documents)


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """The lines of texts that are not empty."""
    return (line for text in texts for line in text.split("\n") if line)


def by_language(options: list[str]) -> dict[str, list[Path]]:
    """The files of options LANG=FILE by their language.

    Raises:
        InputError: an option of another form.
    """
    from megatron_cpt.errors import InputError

    files: dict[str, list[Path]] = {}
    for option in options:
        language, equals, file = option.partition("=")
        if not (language and equals and file):
            raise InputError(f"--text {option!r}: expected LANG=FILE, such as ja=news.jsonl.gz")
        files.setdefault(language, []).append(Path(file))
    return files


def show_facts(value: dict[str, Any]) -> Any:
    """A table with a row for each fact."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, fact in value.items():
        for part, number in fact.items() if isinstance(fact, dict) else [("", fact)]:
            table.add_row(f"{name} {part}".strip(), Text(_shown(number)))
    return table


def _shown(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in fact.items())
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return f"{fact:,}" if isinstance(fact, int) else str(fact)
