"""`megatron-cpt tokenizer convert`: the right Hugging Face files of a tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit
from megatron_cpt.cli.tokenizer.texts import show_facts


def convert(
    model: Annotated[Path, typer.Argument(help="A tokenizer.model, or the folder of a model that holds it.")],
    output: Annotated[Path, typer.Option(help="Folder to write: new or empty.")],
    as_json: JsonOption = False,
) -> None:
    """Write tokenizer.json and the configuration files of an unchanged SentencePiece model.

    Conversions by others rank merges by id and read leading spaces in their own way; these files give
    SentencePiece's ids on every text. `tokenizer verify` proves it.
    """
    from megatron_cpt.tokenizer import convert_tokenizer

    emit({"output": str(output), **convert_tokenizer(model, output)}, as_json, show_facts)
