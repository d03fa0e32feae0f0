"""`megatron-cpt tokenizer train`, `extend` and `replace`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.corpora import (
    Balance,
    Corpus,
    Coverage,
    MaxBytes,
    MoreCorpus,
    Presegment,
    corpora_of,
    corpus_texts,
)
from megatron_cpt.cli.tokenizer.texts import TextField, read_texts, show_facts

Output = Annotated[Path, typer.Option(help="Folder to write: new or empty.")]
Language = Annotated[str, typer.Option(help="Short name of the language, such as ja, for the manifest.")]
BaseModel = Annotated[
    Path, typer.Argument(help="Folder with tokenizer.model or (byte-level) tokenizer.json, or that file.")
]
Divisor = Annotated[int, typer.Option(min=1, help="The new size is a multiple of this.")]
Script = Annotated[str, typer.Option(help="Which pieces to take: ja, ko, de or any.")]
Scores = Annotated[
    str,
    typer.Option(
        help="Scores of the new pieces: rank-tail (below all of the base), own-rank (each at its own rank, recuts the "
        "base's languages), or zero (a control, without tokenizer.json)."
    ),
]
MinCount = Annotated[
    int,
    typer.Option(
        min=0,
        help="Leave out pieces that the extended tokenizer uses fewer times in the corpus (byte-level: pairs that "
        "come up fewer times).",
    ),
]


def train(
    corpus: Corpus,
    vocab_size: Annotated[int, typer.Option(min=260, help="Ids of the tokenizer, 259 special and byte ids included.")],
    output: Output,
    more: MoreCorpus = None,
    language: Language = "",
    model_type: Annotated[str, typer.Option(help="bpe, unigram, or byte-level (BPE as Llama 3's).")] = "bpe",
    balance: Balance = None,
    max_bytes: MaxBytes = None,
    character_coverage: Coverage = 0.9995,
    normalization: Annotated[
        str, typer.Option(help="identity, nfkc or nmt_nfkc; the last two need --model-only.")
    ] = "identity",
    model_only: Annotated[bool, typer.Option("--model-only", help="Write tokenizer.model alone.")] = False,
    presegment: Presegment = "",
    text_field: TextField = "text",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a Llama-like tokenizer on one or more languages: SentencePiece, or byte-level BPE."""
    from megatron_cpt.tokenizer import train_tokenizer
    from megatron_cpt.tokenizer.byte_level import train_byte_level

    files = corpora_of([*corpus, *(more or ())], language)
    if dry_run:
        _say_plan(files, text_field, output, as_json, vocab_size=vocab_size)
        return
    with progress(f"Training {output}") as advance:
        texts = corpus_texts(files, text_field, balance, max_bytes, advance)
        if model_type == "byte-level":
            _refuse_for_bytes(normalization != "identity", model_only, bool(presegment))
            report = train_byte_level(texts, vocab_size, output, language=_named(files))
        else:
            report = train_tokenizer(
                texts,
                vocab_size,
                output,
                character_coverage=character_coverage,
                language=_named(files),
                model_type=model_type,
                normalization=normalization,
                model_only=model_only,
                presegment=presegment,
            )
    emit({"output": str(output), **asdict(report)}, as_json, show_facts)


def extend(
    base_model: BaseModel,
    output: Output,
    corpus: Annotated[
        list[str] | None, typer.Option(metavar="FILE...", help="Corpus; needed except with --pieces.")
    ] = None,
    num_pieces: Annotated[
        int | None, typer.Option(min=1, help="Pieces of the target language to train and offer.")
    ] = None,
    more: MoreCorpus = None,
    pieces: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Offer these pieces, one a line, instead of trained ones.")
    ] = None,
    script: Script = "ja",
    scores: Scores = "rank-tail",
    min_count: MinCount = 0,
    divisor: Divisor = 8,
    language: Annotated[str, typer.Option(help="Short name of the language; by default that of the script.")] = "",
    balance: Balance = None,
    max_bytes: MaxBytes = None,
    character_coverage: Coverage = 0.9995,
    presegment: Presegment = "",
    text_field: TextField = "text",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Append pieces of a target language; text without its script is cut exactly as before."""
    from megatron_cpt.tokenizer import extend_tokenizer, load_tokenizer, read_piece_list

    language = language or ("" if script == "any" else script)
    files = corpora_of([*(corpus or ()), *(more or ())], language)
    listed = None if pieces is None else read_piece_list(pieces)
    _check_offer(listed is not None, bool(files), num_pieces, min_count)
    num_pieces = num_pieces or 1
    if dry_run:
        old_size = load_tokenizer(base_model).vocab_size
        offered = num_pieces if listed is None else len(listed)
        _say_plan(files, text_field, output, as_json, old_size=old_size, num_pieces=offered, script=script)
        return
    with progress(f"Extending {base_model}") as advance:
        report = extend_tokenizer(
            base_model,
            corpus_texts(files, text_field, balance, max_bytes, advance) if files else (),
            num_pieces,
            script,
            divisor,
            output,
            language,
            character_coverage,
            scores=scores,
            min_count=min_count,
            pieces=listed,
            presegment=presegment,
        )
    emit({"output": str(output), **asdict(report)}, as_json, show_facts)


def replace(
    base_model: BaseModel,
    corpus: Corpus,
    vocab_size: Annotated[int, typer.Option(min=1, help="Ids of the new vocabulary: fewer, as many, or more.")],
    output: Output,
    more: MoreCorpus = None,
    balance: Balance = None,
    max_bytes: MaxBytes = None,
    divisor: Divisor = 8,
    character_coverage: Coverage = 0.9995,
    presegment: Presegment = "",
    text_field: TextField = "text",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a vocabulary of several languages in which every piece the base has keeps the base's id."""
    from megatron_cpt.tokenizer import load_tokenizer, replace_tokenizer

    files = corpora_of([*corpus, *(more or ())], "")
    if dry_run:
        old_size = load_tokenizer(base_model).vocab_size
        _say_plan(files, text_field, output, as_json, old_size=old_size, vocab_size=vocab_size)
        return
    with progress(f"Replacing {base_model}") as advance:
        report = replace_tokenizer(
            base_model,
            corpus_texts(files, text_field, balance, max_bytes, advance),
            vocab_size,
            divisor,
            output,
            _named(files),
            character_coverage,
            presegment=presegment,
        )
    emit({"output": str(output), **asdict(report)}, as_json, show_facts)


def _refuse_for_bytes(normalization: bool, model_only: bool, presegment: bool) -> None:
    from megatron_cpt.errors import InputError

    if normalization or model_only or presegment:
        raise InputError(
            "--normalization, --model-only and --presegment are for SentencePiece models: leave them out with "
            "--model-type byte-level"
        )


def _check_offer(listed: bool, has_corpus: bool, num_pieces: int | None, min_count: int) -> None:
    from megatron_cpt.errors import InputError

    if not listed and not (has_corpus and num_pieces):
        raise InputError("got no pieces to offer: give --corpus FILE and --num-pieces N, or --pieces FILE")
    if listed and (num_pieces or (min_count and not has_corpus)):
        raise InputError(
            "--pieces offers its own number of pieces: leave --num-pieces out, and give --corpus with --min-count"
        )


def _named(files: dict[str, list[Path]]) -> str:
    """The languages as the manifest names them."""
    return ",".join(language for language in files if language)


def _say_plan(files: dict[str, list[Path]], text_field: str, output: Path, as_json: bool, **facts: Any) -> None:
    """What a run would do, after a look at the first document and the output folder."""
    from megatron_cpt.config.folders import check_free
    from megatron_cpt.errors import TokenizerError

    check_free(output, TokenizerError)
    corpus = [file for own in files.values() for file in own]
    first = next(read_texts(corpus, text_field, "", None), None)
    sizes = {str(file): file.stat().st_size for file in corpus}
    value = {"output": str(output), "files": sizes, **facts, "first_text": None if first is None else first[:80]}
    emit(value, as_json, show_facts)
