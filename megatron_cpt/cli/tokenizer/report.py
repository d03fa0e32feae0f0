"""`megatron-cpt tokenizer report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.texts import TextField, by_language, lines_of, read_texts


def report(
    folder: Annotated[Path, typer.Argument(help="Tokenizer folder.")],
    base: Annotated[Path, typer.Option(help="Tokenizer to compare with: a folder or model file.")],
    text: Annotated[list[str], typer.Option(metavar="LANG=FILE...", help="Texts, each with its language.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="LANG=FILE", show_default=False, hidden=True)] = None,
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Compare a tokenizer with its base: bytes per token, byte fallback, lines that are cut differently."""
    from megatron_cpt.tokenizer import load_tokenizer, measure, source_lines_changed

    old, new = load_tokenizer(base), load_tokenizer(folder)
    languages = {}
    for language, files in by_language([*text, *(more or ())]).items():
        with progress(f"Measuring {language}") as advance:
            lines = list(lines_of(read_texts(files, text_field, language, advance)))
        languages[language] = {
            "base": measure(old, lines),
            "adapted": measure(new, lines),
            "lines_changed": source_lines_changed(old, new, lines),
        }
    sizes = {"base": old.vocab_size, "adapted": new.vocab_size}
    emit({"vocab_size": sizes, "languages": languages}, as_json, _comparison)


def _comparison(value: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("language", "bytes/token", "base", "byte fallback", "base", "lines cut differently", box=None)
    for language, facts in value["languages"].items():
        adapted, base, changed = facts["adapted"], facts["base"], facts["lines_changed"]
        table.add_row(
            language,
            f"{adapted['bytes_per_token']:.3f}",
            f"{base['bytes_per_token']:.3f}",
            f"{adapted['byte_fallback_share']:.2%}",
            f"{base['byte_fallback_share']:.2%}",
            f"{changed['changed']:,} of {changed['total']:,}",
        )
    sizes = value["vocab_size"]
    table.caption = f"vocabulary {sizes['adapted']:,}, base {sizes['base']:,}"
    return table
