"""`megatron-cpt tokenizer verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.texts import MoreFiles, TextField, lines_of, read_texts, show_facts


def verify(
    folder: Annotated[Path, typer.Argument(help="Tokenizer folder.")],
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Texts to compare on, beside the built-in ones.")
    ] = None,
    more: MoreFiles = None,
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Prove that tokenizer.json gives SentencePiece's ids on every line, and that the folder is whole."""
    from megatron_cpt.tokenizer import verify_tokenizer

    with progress(f"Verifying {folder}") as advance:
        lines = lines_of(read_texts([*(text or ()), *(more or ())], text_field, "", advance))
        emit(verify_tokenizer(folder, lines), as_json, show_facts)
