"""`megatron-cpt data build`: corpus files to an indexed dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress
from megatron_cpt.cli.data.facts import show_facts

if TYPE_CHECKING:
    from megatron_cpt.data import Document


def build(
    files: Annotated[list[Path], typer.Argument(help="Corpus: .jsonl or .txt (also .gz, .zst), or .parquet.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder or model file.")],
    output: Annotated[str, typer.Option(help="Prefix of the dataset to write.")],
    language: Annotated[str, typer.Option(help="Short name of the language, such as ja.")] = "",
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    workers: Annotated[int, typer.Option(min=1, help="Threads of the tokenizer.")] = 1,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of the works to hold out.")] = 0.0,
    only_held_out: Annotated[bool, typer.Option("--only-held-out", help="Write the held-out side.")] = False,
    bos: Annotated[bool, typer.Option(help="Begin each document with bos.")] = True,
    eos: Annotated[bool, typer.Option(help="End each document with eos.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is already there.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write OUTPUT.bin and OUTPUT.idx, readable by megatron-core, from corpus files.

    With --held-out F, works (ids up to '#') are split by a hash: one call without and one with
    --only-held-out give two disjoint datasets.
    """
    from megatron_cpt.config.manifest import sha256_file
    from megatron_cpt.config.schema import LANGUAGE_PATTERN, LANGUAGE_RULE
    from megatron_cpt.data import build_dataset, check_no_dataset, is_held_out, read_documents
    from megatron_cpt.errors import InputError

    if only_held_out and not held_out:
        raise InputError("--only-held-out without --held-out: say which share of the works, such as 0.05")
    if language and not re.fullmatch(LANGUAGE_PATTERN, language):
        raise InputError(f"--language {language}: expected {LANGUAGE_RULE}")
    if dry_run:
        if not overwrite:
            check_no_dataset(output)
        mine = (d for d in read_documents(files, text_field) if is_held_out(d, held_out) == only_held_out)
        emit(_plan_of(files, tokenizer, output, mine), as_json, show_facts)
        return
    with progress(f"Building {output}") as advance:
        documents = read_documents(files, text_field, language, on_progress=advance)
        manifest = build_dataset(
            (document for document in documents if is_held_out(document, held_out) == only_held_out),
            tokenizer,
            output,
            language,
            num_threads=workers,
            append_bos=bos,
            append_eos=eos,
            inputs={str(file): sha256_file(file) for file in files if file.is_file()},
            overwrite=overwrite,
        )
    emit({"prefix": output, **manifest}, as_json, show_facts)


def _plan_of(files: list[Path], tokenizer: Path, output: str, documents: Iterable[Document]) -> dict[str, Any]:
    from megatron_cpt.errors import DataError
    from megatron_cpt.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    first = next((document for document in documents if document.text), None)
    if first is None:
        raise DataError(f"no document to write to {output}: the corpus, or this side of it, is empty")
    return {
        "output": output,
        "files": {str(file): file.stat().st_size for file in files},
        "vocab_size": loaded.vocab_size,
        "tokenizer_sha256": loaded.sha256,
        "first_document": {"source": first.source, "ids": loaded.encode(first.text)[:16]},
    }
