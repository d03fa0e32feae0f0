"""`megatron-cpt data inspect` and `verify`: look into a dataset, prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.data.facts import show_facts

Prefix = Annotated[str, typer.Argument(help="Dataset: its path without .bin or .idx.")]


def inspect(
    prefix: Prefix,
    document: Annotated[int | None, typer.Option(min=0, help="Show this document.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="Show this sample of a plan with one source.")] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the plan.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer, where it is no longer where it was.")] = None,
    foreign: Annotated[
        bool, typer.Option("--foreign", help="Read a dataset of another tool, without a manifest.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a dataset holds: its facts, one document or one sample, decoded."""
    from megatron_cpt.data import IndexedDataset, describe, describe_document, describe_sample, tokenizer_of

    dataset = IndexedDataset(prefix, foreign=foreign)
    value = describe(dataset)
    if document is not None:
        value["document"] = describe_document(dataset, tokenizer_of(dataset, tokenizer), document)
    if sample is not None:
        value["sample"] = describe_sample(dataset, tokenizer_of(dataset, tokenizer), sample, seq_length, seed)
    emit(value, as_json, show_facts)


def verify(
    prefix: Prefix,
    inputs: Annotated[bool, typer.Option("--inputs", help="Also hash the files it was built from.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove that a dataset is whole: sizes, hashes, counts, every token id, bos and eos of every document."""
    from megatron_cpt.data import verify_dataset

    with progress(f"Verifying {prefix}") as advance:
        value = verify_dataset(prefix, inputs, on_progress=advance)
    emit(value, as_json, show_facts)
