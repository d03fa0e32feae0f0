"""`megatron-cpt data pairs`: sentence pairs to documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import JsonOption, emit
from megatron_cpt.cli.data.facts import show_facts


def pairs(
    files: Annotated[list[Path], typer.Argument(help="Pairs: .jsonl or .tsv (also .gz, .zst), or .parquet.")],
    languages: Annotated[str, typer.Option(help="The two languages, such as en,ja.")],
    output: Annotated[Path, typer.Option(help="File to write: .jsonl, .jsonl.gz or .jsonl.zst.")],
    fields: Annotated[
        str, typer.Option(help="The two fields, or columns of a .tsv from 1. Default: named as the languages.")
    ] = "",
    template: Annotated[str, typer.Option(help="plain, instruction, or a text with {source} and {target}.")] = "plain",
    direction: Annotated[
        str, typer.Option(help="sampled (one of the two for each pair), both, forward or backward.")
    ] = "sampled",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled directions.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Write a parallel corpus as documents, for `data build`; pairs with an empty side are left out and counted.

    Parts of one work (ids up to '#') stay recognisable, so `data build --held-out` keeps them on one side.
    """
    from typing import get_args

    from megatron_cpt.config.schema import LANGUAGE_PATTERN, LANGUAGE_RULE
    from megatron_cpt.data.pairs import Direction, PairSettings, Template, write_pairs
    from megatron_cpt.errors import InputError

    names = _two(languages, "--languages", "such as en,ja")
    for name in names:
        if not re.fullmatch(LANGUAGE_PATTERN, name):
            raise InputError(f"--languages {languages}: expected {LANGUAGE_RULE}")
    places = _two(fields, "--fields", "such as en,ja, or 4,5 for a .tsv") if fields else names
    known = {str(value): value for value in get_args(Direction)}
    if direction not in known:
        raise InputError(f"--direction {direction}: expected one of {', '.join(known)}")
    settings = PairSettings(names, Template(template.replace("\\n", "\n")), known[direction], seed)
    emit(write_pairs(files, places, settings, output), as_json, show_facts)


def _two(value: str, option: str, example: str) -> tuple[str, str]:
    from megatron_cpt.errors import InputError

    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 2 or parts[0] == parts[1] or not all(parts):
        raise InputError(f"{option} {value}: expected two different names, {example}")
    return parts[0], parts[1]
