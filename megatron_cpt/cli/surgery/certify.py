"""`megatron-cpt surgery certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit
from megatron_cpt.cli.tokenizer.texts import TextField, by_language


def certify(
    plan: Annotated[Path, typer.Argument(help="Folder of the plan.")],
    base: Annotated[Path, typer.Argument(help="The base model: a Hugging Face or torch_dist folder.")],
    operated: Annotated[Path, typer.Argument(help="What `surgery apply` wrote of it by this plan.")],
    text: Annotated[list[str], typer.Option(metavar="LANG=FILE...", help="Held-out texts, each with its language.")],
    source: Annotated[str, typer.Option(help="The language that must not be lost, one of --text.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="LANG=FILE", show_default=False, hidden=True)] = None,
    old_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder or file of the base's tokenizer. Default: the base's folder.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder or file of the new tokenizer. Default: the new model's folder, else the plan's copy."
        ),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Context in tokens. Default: the model's, at most 4096.")
    ] = None,
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Prove what the surgery left alone, and measure the model before its first step.

    Exit code 1 where a kept row or a logit of kept tokens has moved, or a new row is not the plan's.
    """
    from megatron_cpt.checkpoint import read_shape
    from megatron_cpt.data import read_documents
    from megatron_cpt.errors import DataError, InputError
    from megatron_cpt.evaluation import certify, check_certificate
    from megatron_cpt.surgery import SurgeryPlan
    from megatron_cpt.surgery.plan import TOKENIZER

    files = by_language([*text, *(more or ())])
    if source not in files:
        raise InputError(f"--source {source} is none of the texts ({', '.join(files)}): give --text {source}=FILE")
    texts = {name: list(read_documents(paths, text_field, name)) for name, paths in files.items()}
    for name, documents in texts.items():
        if not any(document.text.strip() for document in documents):
            given = ", ".join(map(str, files[name]))
            raise DataError(f"--text {name}={given} holds no text to score; give a file with at least one document")
    loaded = SurgeryPlan.load(plan)
    old = _tokenizer(old_tokenizer, "--old-tokenizer", base)
    new = _tokenizer(tokenizer, "--tokenizer", operated, plan / TOKENIZER)
    length = seq_length or min(4096, read_shape(base)[0].max_position_embeddings)
    emit(certify(base, operated, loaded, old, texts, source, length, new), as_json, _page)
    check_certificate(operated)


def _tokenizer(given: Path | None, option: str, *folders: Path) -> Path:
    """What was given, else the first of the folders that holds a tokenizer."""
    from megatron_cpt.checkpoint.tokenizer_files import tokenizer_sha256
    from megatron_cpt.errors import TokenizerError

    found = given or next((folder for folder in folders if tokenizer_sha256(folder) is not None), None)
    if found is None:
        where = " and ".join(map(str, folders))
        raise TokenizerError(
            f"{where}: no tokenizer.model or tokenizer.json is there; name the tokenizer with {option}"
        )
    return found


def _page(value: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    kept, logits = value["kept_rows"], value["logits"]
    facts = Table(show_header=False, box=None)
    facts.add_row("passed", "yes" if value["passed"] else "NO")
    facts.add_row("kept rows that differ", f"{kept['different']:,} of {kept['compared']:,}")
    new, padding = value["new_rows"], value["padding_rows"]
    rounded = f", {new['rounded']:,} by rounding alone" if new["rounded"] else ""
    facts.add_row("other rows unlike the plan's", f"{new['different']:,} of {new['compared']:,}{rounded}")
    facts.add_row("rows of padding not zero", f"{padding['different']:,} of {padding['compared']:,}")
    moved = "nothing to compare: a matrix keeps no row"
    if logits["max_abs_diff"] is not None:
        moved = f"{logits['max_abs_diff']:.1e} over {logits['tokens']:,} tokens"
    facts.add_row("logits of kept tokens move by", moved)
    rows = Table("matrix", "norm of old rows", "of new rows", "equal", "zero", "not finite", box=None)
    for name, found in value["matrices"].items():
        norms = [" ".join(f"{norm:.3g}" for norm in found["norms"][side].values()) or "-" for side in ("old", "new")]
        counts = [f"{found[f'new_{fault}']:,}" for fault in ("duplicates", "zero", "not_finite")]
        rows.add_row(name, *norms, *counts)
    rows.caption = "norms: 5 %, 50 % and 95 % of the rows are at most this long"
    bits = Table("language", "bits per byte before", "after", "probability of new rows", box=None)
    for language, score in value["bits_per_byte"].items():
        share = value["probability_of_new_rows"][language]
        bits.add_row(language, f"{score['before']:.4f}", f"{score['after']:.4f}", f"{share:.2%}")
    return Group(facts, "", rows, "", bits)
