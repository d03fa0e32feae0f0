"""`megatron-cpt data inspect` and `verify`: look into a dataset, prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.data.facts import show_facts
from megatron_cpt.errors import ConfigError

Prefix = Annotated[str, typer.Argument(help="Dataset: its path without .bin or .idx.")]


def inspect(
    prefix: Annotated[str | None, typer.Argument(help="Dataset: its path without .bin or .idx.")] = None,
    plan: Annotated[str | None, typer.Option(help="YAML file of a training job, instead of a dataset.")] = None,
    document: Annotated[int | None, typer.Option(min=0, help="Show this document of the dataset.")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Find the document's line: reads its file again up to there.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Show this sample of the job, or of a plan of the dataset alone.")
    ] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample, without --plan.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order, without --plan.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer, where it is no longer where it was.")] = None,
    foreign: Annotated[
        bool, typer.Option("--foreign", help="Read a dataset of another tool, without a manifest.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a dataset holds, or where a sample of a training job comes from; texts are decoded."""
    from megatron_cpt.data import (
        IndexedDataset,
        SamplePlan,
        describe,
        describe_document,
        describe_sample,
        tokenizer_of,
        trace_document,
    )

    if (prefix is None) == (plan is None):
        got = "neither PREFIX nor --plan" if plan is None else f"both PREFIX {prefix} and --plan {plan}"
        raise ConfigError(f"data inspect: got {got}; expected PREFIX, or --plan CONFIG --sample NUMBER")
    if plan is not None and document is not None:
        raise ConfigError(
            "data inspect: --document is of a dataset; give PREFIX in place of --plan, or --sample NUMBER"
        )
    if plan is not None and sample is None:
        raise ConfigError(
            "data inspect --plan: got no --sample; say which sample of the job to show, such as --sample 0"
        )
    if plan is not None and sample is not None:
        emit({"sample": _sample_of_job(plan, tokenizer, sample)}, as_json, show_facts)
        return
    dataset = IndexedDataset(str(prefix), foreign=foreign)
    value = describe(dataset)
    if document is not None:
        origin = {"origin": trace_document(dataset, document)} if trace else {}
        value["document"] = {**describe_document(dataset, tokenizer_of(dataset, tokenizer), document), **origin}
    if sample is not None:
        alone = SamplePlan([(dataset, dataset.language)], seq_length, seed)
        value["sample"] = describe_sample(alone, tokenizer_of(dataset, tokenizer), sample)
    emit(value, as_json, show_facts)


def _sample_of_job(path: str, tokenizer: Path | None, number: int) -> dict[str, Any]:
    from megatron_cpt.config.loading import load_config
    from megatron_cpt.config.schema import TrainConfig
    from megatron_cpt.data import describe_sample, open_plan, tokenizer_of

    config = load_config(path, TrainConfig).config
    opened = open_plan(config.data, config.batch.seq_length, config.seed)
    return describe_sample(opened, tokenizer_of(opened.datasets[0], tokenizer or Path(config.tokenizer)), number)


def verify(
    prefix: Prefix,
    inputs: Annotated[bool, typer.Option("--inputs", help="Also hash the files it was built from.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove that a dataset is whole: sizes, hashes, counts, every token id, bos and eos of every document, packs."""
    from megatron_cpt.data import verify_dataset

    with progress(f"Verifying {prefix}") as advance:
        value = verify_dataset(prefix, inputs, on_progress=advance)
    emit(value, as_json, show_facts)
