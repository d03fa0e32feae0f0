"""`megatron-cpt data build`: corpus files to an indexed dataset."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress
from megatron_cpt.cli.data.cluster import RayOption, WorkersOption
from megatron_cpt.cli.data.facts import show_facts

if TYPE_CHECKING:
    from megatron_cpt.data import DatasetBuild


def build(
    files: Annotated[list[Path], typer.Argument(help="Corpus: .jsonl or .txt (also .gz, .zst), or .parquet.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder or model file.")],
    output: Annotated[str, typer.Option(help="Prefix of the dataset to write.")],
    language: Annotated[str, typer.Option(help="Short name of the language, such as ja.")] = "",
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    workers: WorkersOption = None,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of the works to hold out.")] = 0.0,
    only_held_out: Annotated[bool, typer.Option("--only-held-out", help="Write the held-out side.")] = False,
    bos: Annotated[bool, typer.Option(help="Begin each document with bos.")] = True,
    eos: Annotated[bool, typer.Option(help="End each document with eos.")] = True,
    on_error: Annotated[str, typer.Option(metavar="stop|skip", help="What to do at a broken record.")] = "stop",
    shard: Annotated[str, typer.Option(metavar="I/N", help="Work on every N-th file from the I-th (from 0).")] = "",
    ray: RayOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is already there.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write OUTPUT.bin and OUTPUT.idx, readable by megatron-core, from corpus files.

    Killed at any moment, the same command goes on where it was and ends with the same bytes. With --shard I/N
    the files are shared out over N commands, on one machine or several with a common file system; the same
    command without --shard then makes what is missing, and the dataset. With --ray the files are tasks of a Ray
    cluster that is already running, on a file system that all its hosts mount. With --held-out F, works (ids up to
    '#') are split by a hash: one call without and one with --only-held-out give two disjoint datasets.
    """
    from megatron_cpt.config.schema import LANGUAGE_PATTERN, LANGUAGE_RULE
    from megatron_cpt.data import DatasetBuild, build_files
    from megatron_cpt.errors import InputError

    if only_held_out and not held_out:
        raise InputError("--only-held-out without --held-out: say which share of the works, such as 0.05")
    if language and not re.fullmatch(LANGUAGE_PATTERN, language):
        raise InputError(f"--language {language}: expected {LANGUAGE_RULE}")
    side = (held_out, "held_out" if only_held_out else "train") if held_out else None
    job = DatasetBuild(files, tokenizer, output, language, side, bos, eos, text_field, on_error)
    if dry_run:
        emit(_plan_of(job, overwrite), as_json, show_facts)
        return
    with progress(f"Building {output}") as advance:
        made = build_files(
            job,
            workers,
            shard_of(shard),
            overwrite,
            ray,
            advance,
            notice=lambda text: typer.echo(text, err=True),
            on_joining=partial(advance, step=f"Joining {output}"),
        )
    emit({"prefix": output, **made}, as_json, show_facts)


def shard_of(text: str) -> tuple[int, int] | None:
    """The shard that `--shard` names, None for an empty text; raises InputError for what is no I/N."""
    from megatron_cpt.errors import InputError

    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise InputError(f"--shard {text}: expected I/N such as 0/8, I from 0")
    return int(match[1]), int(match[2])


def _plan_of(job: DatasetBuild, overwrite: bool) -> dict[str, Any]:
    from megatron_cpt.data import is_held_out, read_documents
    from megatron_cpt.errors import DataError
    from megatron_cpt.tokenizer import load_tokenizer

    parts = job.parts()
    parts.check_inputs()
    is_made = not overwrite and job.is_made(may_differ=parts.is_begun())
    loaded = load_tokenizer(job.tokenizer)
    fraction, side = job.held_out or (0.0, "train")
    documents = read_documents(job.paths, job.text_field, on_error=job.on_error)
    mine = (d for d in documents if d.text and is_held_out(d, fraction) == (side == "held_out"))
    first = next(mine, None)
    if first is None:
        raise DataError(f"no document to write to {job.prefix}: the corpus, or this side of it, is empty")
    return {
        "output": str(job.prefix),
        "already_built": is_made,
        "files": {str(file): file.stat().st_size for file in job.paths},
        "vocab_size": loaded.vocab_size,
        "tokenizer_sha256": loaded.sha256,
        "first_document": {"source": first.source, "ids": loaded.encode(first.text)[:16]},
    }
