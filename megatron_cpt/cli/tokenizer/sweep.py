"""`megatron-cpt tokenizer sweep`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.corpora import (
    Coverage,
    MaxBytes,
    MoreCorpus,
    Presegment,
    corpora_of,
    corpus_texts,
)
from megatron_cpt.cli.tokenizer.making import BaseModel, Divisor, Scores, Script
from megatron_cpt.cli.tokenizer.texts import TextField, by_language, lines_of, read_texts


def sweep(
    base_model: BaseModel,
    corpus: Annotated[list[str], typer.Option(metavar="FILE...", help="Corpus of the target language.")],
    sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of pieces to offer.")],
    text: Annotated[
        list[str], typer.Option(metavar="LANG=FILE...", help="Text to measure, the target language first.")
    ],
    more: MoreCorpus = None,
    script: Script = "ja",
    scores: Scores = "rank-tail",
    divisor: Divisor = 8,
    max_bytes: MaxBytes = None,
    character_coverage: Coverage = 0.9995,
    presegment: Presegment = "",
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Measure extensions of several sizes, to choose one; nothing is written."""
    from megatron_cpt.tokenizer import sweep_sizes

    numbers = _numbers(sizes)
    # Files that follow an option come as arguments: those with a language are text to measure.
    further = [file for file in more or () if "=" in file]
    corpus = [*corpus, *(file for file in more or () if "=" not in file)]
    held_out = {
        language: list(lines_of(read_texts(files, text_field, language, None)))
        for language, files in by_language([*text, *further]).items()
    }
    with progress(f"Sweeping {base_model}") as advance:
        result = sweep_sizes(
            base_model,
            corpus_texts(corpora_of(corpus, ""), text_field, None, max_bytes, advance),
            numbers,
            held_out,
            script,
            divisor,
            character_coverage=character_coverage,
            scores=scores,
            presegment=presegment,
        )
    emit(asdict(result), as_json, _table)


def _numbers(sizes: str) -> list[int]:
    from megatron_cpt.errors import InputError

    try:
        return [int(size) for size in sizes.split(",")]
    except ValueError:
        raise InputError(f"--sizes {sizes!r}: expected numbers of pieces, such as 4000,8000,16000") from None


def _table(value: dict[str, Any]) -> Any:
    from rich.table import Table

    rows = value["rows"]
    languages = list(rows[0]["bytes_per_token"])
    table = Table("pieces offered", "vocabulary", *(f"{language} bytes/token" for language in languages), box=None)
    for row in rows:
        offered = f"{row['num_pieces']:,}" if row["num_pieces"] else "base"
        lengths = (f"{row['bytes_per_token'][language]:.3f}" for language in languages)
        table.add_row(offered, f"{row['vocab_size']:,}", *lengths)
    table.caption = (
        f"suggested: {value['knee']:,}, where tokens per byte of {languages[0]} lie furthest below the straight line "
        "from the base to the largest size; what more rows cost in training is not part of it"
    )
    return table
