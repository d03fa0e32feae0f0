"""`megatron-cpt tokenizer`: train one, extend one, measure it, prove it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress

if TYPE_CHECKING:
    from megatron_cpt.data import Document

app = typer.Typer(help="Train, extend, measure and verify tokenizers.", no_args_is_help=True)

# An option of click takes one value; the files that follow it, as a shell's pattern leaves them, come as arguments.
Corpus = Annotated[
    list[Path], typer.Option(metavar="FILE...", help="Corpus: .jsonl or .txt (also .gz, .zst), or .parquet.")
]
More = Annotated[list[Path] | None, typer.Argument(metavar="FILE", show_default=False, hidden=True)]
Output = Annotated[Path, typer.Option(help="Folder to write: new or empty.")]
Language = Annotated[str, typer.Option(help="Short name of the language, such as ja, for the manifest.")]
Coverage = Annotated[float, typer.Option(help="Share of the text's characters that get a piece.")]
TextField = Annotated[str, typer.Option(help="Field or column that holds the text.")]


@app.command()
def train(
    corpus: Corpus,
    vocab_size: Annotated[int, typer.Option(min=260, help="Ids of the tokenizer, 259 special and byte ids included.")],
    output: Output,
    more: More = None,
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
        texts = _texts(corpus, text_field, language, advance)
        report = train_tokenizer(texts, vocab_size, output, character_coverage=character_coverage, language=language)
    emit({"output": str(output), **asdict(report)}, as_json, _facts)


@app.command()
def extend(
    base_model: Annotated[Path, typer.Argument(help="Folder with tokenizer.model, or that file.")],
    corpus: Corpus,
    num_pieces: Annotated[int, typer.Option(min=1, help="Pieces of the target language to train and offer.")],
    output: Output,
    more: More = None,
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
        texts = _texts(corpus, text_field, language, advance)
        report = extend_tokenizer(base_model, texts, num_pieces, script, divisor, output, language, character_coverage)
    emit({"output": str(output), **asdict(report)}, as_json, _facts)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Tokenizer folder.")],
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Texts to compare on, beside the built-in ones.")
    ] = None,
    more: More = None,
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Prove that tokenizer.json gives SentencePiece's ids on every line, and that the folder is whole."""
    from megatron_cpt.tokenizer import verify_tokenizer

    with progress(f"Verifying {folder}") as advance:
        lines = _lines(_texts([*(text or ()), *(more or ())], text_field, "", advance))
        emit(verify_tokenizer(folder, lines), as_json, _facts)


@app.command()
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
    for language, files in _by_language([*text, *(more or ())]).items():
        with progress(f"Measuring {language}") as advance:
            lines = list(_lines(_texts(files, text_field, language, advance)))
        languages[language] = {
            "base": measure(old, lines),
            "adapted": measure(new, lines),
            "lines_changed": source_lines_changed(old, new, lines),
        }
    sizes = {"base": old.vocab_size, "adapted": new.vocab_size}
    emit({"vocab_size": sizes, "languages": languages}, as_json, _comparison)


def _texts(files: list[Path], text_field: str, language: str, advance: Any) -> Iterator[str]:
    from megatron_cpt.data import read_documents

    documents: Iterable[Document] = read_documents(files, text_field, language, on_progress=advance) if files else ()
    return (document.text for document in documents)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    return (line for text in texts for line in text.split("\n") if line)


def _by_language(options: list[str]) -> dict[str, list[Path]]:
    from megatron_cpt.errors import InputError

    files: dict[str, list[Path]] = {}
    for option in options:
        language, equals, file = option.partition("=")
        if not (language and equals and file):
            raise InputError(f"--text {option!r}: expected LANG=FILE, such as ja=news.jsonl.gz")
        files.setdefault(language, []).append(Path(file))
    return files


def _say_plan(corpus: list[Path], text_field: str, output: Path, as_json: bool, **facts: Any) -> None:
    """What a run would do, after a look at the first document and the output folder."""
    from megatron_cpt.config.folders import check_free
    from megatron_cpt.errors import TokenizerError

    check_free(output, TokenizerError)
    first = next(_texts(corpus, text_field, "", None), None)
    files = {str(file): file.stat().st_size for file in corpus}
    value = {"output": str(output), "files": files, **facts, "first_text": None if first is None else first[:80]}
    emit(value, as_json, _facts)


def _facts(value: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, fact in value.items():
        for part, number in fact.items() if isinstance(fact, dict) else [("", fact)]:
            shown = f"{number:,}" if isinstance(number, int) else str(number)
            table.add_row(f"{name} {part}".strip(), Text(shown))
    return table


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
