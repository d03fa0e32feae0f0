"""`megatron-cpt tokenizer train` and `extend`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.texts import MoreFiles, TextField, read_texts, show_facts

Corpus = Annotated[
    list[Path], typer.Option(metavar="FILE...", help="Corpus: .jsonl or .txt (also .gz, .zst), or .parquet.")
]
Output = Annotated[Path, typer.Option(help="Folder to write: new or empty.")]
Language = Annotated[str, typer.Option(help="Short name of the language, such as ja, for the manifest.")]
Coverage = Annotated[float, typer.Option(help="Share of the text's characters that get a piece.")]


def train(
    corpus: Corpus,
    vocab_size: Annotated[int, typer.Option(min=260, help="Ids of the tokenizer, 259 special and byte ids included.")],
    output: Output,
    more: MoreFiles = None,
    language: Language = "",
    character_coverage: Coverage = 0.9995,
    text_field: TextField = "text",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a Llama-like SentencePiece tokenizer (BPE, byte fallback, single digits)."""
    from megatron_cpt.tokenizer import train_tokenizer

    corpus = [*corpus, *(more or ())]
    if dry_run:
        _say_plan(corpus, text_field, output, as_json, vocab_size=vocab_size)
        return
    with progress(f"Training {output}") as advance:
        texts = read_texts(corpus, text_field, language, advance)
        report = train_tokenizer(texts, vocab_size, output, character_coverage=character_coverage, language=language)
    emit({"output": str(output), **asdict(report)}, as_json, show_facts)


def extend(
    base_model: Annotated[Path, typer.Argument(help="Folder with tokenizer.model, or that file.")],
    corpus: Corpus,
    num_pieces: Annotated[int, typer.Option(min=1, help="Pieces of the target language to train and offer.")],
    output: Output,
    more: MoreFiles = None,
    script: Annotated[str, typer.Option(help="Which pieces to take: ja, ko, de or any.")] = "ja",
    divisor: Annotated[int, typer.Option(min=1, help="The new size is a multiple of this.")] = 8,
    language: Annotated[str, typer.Option(help="Short name of the language; by default that of the script.")] = "",
    character_coverage: Coverage = 0.9995,
    text_field: TextField = "text",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Append pieces of a target language; text without its script is cut exactly as before."""
    from megatron_cpt.tokenizer import extend_tokenizer, load_tokenizer

    corpus = [*corpus, *(more or ())]
    language = language or ("" if script == "any" else script)
    if dry_run:
        old_size = load_tokenizer(base_model).vocab_size
        _say_plan(corpus, text_field, output, as_json, old_size=old_size, num_pieces=num_pieces, script=script)
        return
    with progress(f"Extending {base_model}") as advance:
        texts = read_texts(corpus, text_field, language, advance)
        report = extend_tokenizer(base_model, texts, num_pieces, script, divisor, output, language, character_coverage)
    emit({"output": str(output), **asdict(report)}, as_json, show_facts)


def _say_plan(corpus: list[Path], text_field: str, output: Path, as_json: bool, **facts: Any) -> None:
    """What a run would do, after a look at the first document and the output folder."""
    from megatron_cpt.config.folders import check_free
    from megatron_cpt.errors import TokenizerError

    check_free(output, TokenizerError)
    first = next(read_texts(corpus, text_field, "", None), None)
    files = {str(file): file.stat().st_size for file in corpus}
    value = {"output": str(output), "files": files, **facts, "first_text": None if first is None else first[:80]}
    emit(value, as_json, show_facts)
