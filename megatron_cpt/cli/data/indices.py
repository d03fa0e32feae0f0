"""`megatron-cpt data indices`: the index files that Megatron would build for a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit
from megatron_cpt.cli.data.facts import show_facts


def indices(
    prefix: Annotated[str, typer.Argument(help="Dataset: its path without .bin or .idx, as Megatron is given it.")],
    seq_length: Annotated[int, typer.Option(min=1, help="Megatron's --seq-length.")],
    num_samples: Annotated[str, typer.Option(help="Samples of train, valid and test: 1000,100,10; 'all': one epoch.")],
    output: Annotated[Path, typer.Option(help="Megatron's --data-cache-path.")],
    mcore_compat: Annotated[
        bool,
        typer.Option("--mcore-compat", help="As megatron-core's GPTDataset does; the only kind."),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Megatron's --seed.")] = 1234,
    split: Annotated[str, typer.Option(help="Megatron's --split.")] = "969,30,1",
    tokenizer_identifiers: Annotated[
        Path | None, typer.Option(help="JSON file with the unique_identifiers of Megatron's tokenizer.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the .npy indices of megatron-core 0.16.1, so that Megatron starts without building them.

    Training with this tool needs no index files.
    """
    from megatron_cpt.config.manifest import read_json
    from megatron_cpt.data import IndexedDataset
    from megatron_cpt.data.mcore_indices import McoreSettings, write_mcore_indices
    from megatron_cpt.errors import DataError, InputError

    del mcore_compat  # names the kind; there is no other
    words = [word.strip() for word in num_samples.split(",")]
    if not all(word == "all" or word.isdecimal() for word in words):
        raise InputError(f"--num-samples {num_samples}: expected up to three numbers, such as 1000,100,10, or all")
    settings = McoreSettings(
        seq_length=seq_length,
        num_samples=[None if word == "all" else int(word) for word in words],
        seed=seed,
        split=split,
        tokenizer=read_json(tokenizer_identifiers, DataError) if tokenizer_identifiers else None,
    )
    emit(write_mcore_indices(IndexedDataset(prefix), output, settings), as_json, show_facts)
