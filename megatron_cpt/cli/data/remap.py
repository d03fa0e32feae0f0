"""`megatron-cpt data remap`: a dataset for a changed tokenizer, without its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.data.facts import show_facts


def remap(
    prefix: Annotated[str, typer.Argument(help="Dataset: its path without .bin or .idx.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the new tokenizer, with its vocab_map.json.")],
    output: Annotated[str, typer.Option(help="Prefix of the dataset to write.")],
    old_tokenizer: Annotated[Path | None, typer.Option(help="The dataset's tokenizer, where it was moved.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="How many documents are decoded and encoded again.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Replace every id by the one that its piece has in a new tokenizer.

    Refused where a piece in use is gone, or where the new tokenizer cuts a document in another way, which is tried
    on documents drawn from the whole dataset. Then build the dataset again.
    """
    from megatron_cpt.data import remap_dataset

    with progress(f"Writing {output}") as advance:
        manifest = remap_dataset(prefix, tokenizer, output, old_tokenizer, documents, on_progress=advance)
    emit({"prefix": output, **manifest}, as_json, show_facts)
