"""`megatron-cpt data pack`: lay the documents of a dataset into samples without cutting them."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit
from megatron_cpt.cli.data.facts import show_facts


def pack(
    prefix: Annotated[str, typer.Argument(help="Dataset: its path without .bin or .idx.")],
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")],
    as_json: JsonOption = False,
) -> None:
    """Write PREFIX.pack-S: whole documents in as few samples of S tokens as best-fit decreasing finds.

    A training job whose source says `packing: best_fit` makes it by itself where it is missing.
    """
    from megatron_cpt.data import IndexedDataset, pack_dataset

    manifest = pack_dataset(IndexedDataset(prefix), seq_length)
    emit({"prefix": prefix, **manifest}, as_json, show_facts)
