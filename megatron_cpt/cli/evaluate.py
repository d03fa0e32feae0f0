"""`megatron-cpt evaluate`: bits per byte of a model on held-out text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.errors import DataError, InputError

app = typer.Typer(help="Bits per byte of a model on held-out text.")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of the model: Hugging Face or torch_dist.")],
    text: Annotated[list[str], typer.Option(help="LANGUAGE=FILE (jsonl, txt, parquet; plain, gz or zst). Repeatable.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or file of the tokenizer. Default: the model's.")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Context in tokens. Default: the model's, at most 4096.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field (column) that holds the text.")] = "text",
    as_json: JsonOption = False,
) -> None:
    """Score every document once; the same number as validation during training."""
    from megatron_cpt.checkpoint import read_shape
    from megatron_cpt.data import read_documents
    from megatron_cpt.evaluation import bits_per_byte

    shape, _ = read_shape(model)
    longest = shape.max_position_embeddings
    length = min(4096, longest) if seq_length is None else seq_length
    if length > longest:
        raise InputError(
            f"--seq-length {length} is longer than the max_position_embeddings={longest} of {model}; shorten it"
        )
    files = _files_of(text)
    for language, path in files.items():
        if not any(document.text for document in read_documents([path], text_field, language)):
            raise DataError(f"{path} holds no text to score; give a file with at least one document")
    scores = {}
    for language, path in files.items():
        documents = read_documents([path], text_field, language)
        with progress(language) as advance:
            scores[language] = bits_per_byte(model, documents, length, tokenizer, advance)
    emit({"model": model, "seq_length": length, "scores": scores}, as_json, _table)


def _files_of(pairs: list[str]) -> dict[str, str]:
    """Language -> file."""
    files: dict[str, str] = {}
    for pair in pairs:
        language, equals, path = pair.partition("=")
        if not equals or not language or not path:
            raise InputError(f"--text {pair}: expected LANGUAGE=FILE, for example --text ja=held_out.jsonl.gz")
        if language in files:
            raise InputError(
                f"--text {pair}: {language} was given already, as {files[language]}; each file is scored on its own, "
                "give it a name of its own"
            )
        files[language] = path
    return files


def _table(value: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="")
    for name in ("language", "bits per byte", "bytes per token", "tokens", "bytes"):
        table.add_column(name, justify="left" if name == "language" else "right")
    for language, score in value["scores"].items():
        table.add_row(
            language,
            f"{score['bits_per_byte']:.4f}",
            f"{score['bytes_per_token']:.3f}",
            f"{score['tokens']:,}",
            f"{score['text_bytes']:,}",
        )
    return table
