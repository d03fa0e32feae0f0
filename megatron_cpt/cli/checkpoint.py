"""`megatron-cpt checkpoint`: convert a model between formats, prove it, look into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress

app = typer.Typer(help="Convert, verify and show checkpoints.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of a Hugging Face model or a torch_dist checkpoint.")]


@app.command()
def convert(
    src: Folder,
    dst: Annotated[Path, typer.Argument(help="Folder to make; must be new or empty.")],
    to: Annotated[Literal["hf", "torch_dist"], typer.Option(help="Format to write.")],
    vocab_divisor: Annotated[int, typer.Option(min=1, help="torch_dist: pad the vocabulary to a multiple.")] = 128,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder; default: the source's own.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Cast every tensor; default: as it is.")
    ] = None,
    bos: Annotated[int | None, typer.Option(min=0, help="Id of the token that begins a text.")] = None,
    eos: Annotated[int | None, typer.Option(min=0, help="Id of the token that ends a text.")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SRC to DST tensor by tensor, bit for bit, in the memory of one layer.

    No GPU, no process group and no model is built. DST appears only when it is complete.
    """
    from megatron_cpt.checkpoint import convert

    with progress(f"Converting {src}") as advance:
        facts = convert(
            src,
            dst,
            to,
            vocab_divisor,
            tokenizer,
            dtype,
            bos_token_id=bos,
            eos_token_id=eos,
            dry_run=dry_run,
            on_progress=advance,
        )
    emit(facts, as_json, _facts)


@app.command()
def verify(src: Folder, dst: Folder, as_json: JsonOption = False) -> None:
    """Prove that DST holds the model of SRC: the config field by field, every tensor bit for bit."""
    from megatron_cpt.checkpoint import verify

    with progress(f"Verifying {dst}") as advance:
        facts = verify(src, dst, on_progress=advance)
    emit(facts, as_json, _facts)


@app.command()
def show(path: Folder, as_json: JsonOption = False) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    from megatron_cpt.checkpoint import show

    emit(show(path), as_json, _facts)


def _facts(value: dict[str, Any]) -> RenderableType:
    table = Table(show_header=False, box=None)
    for name, fact in value.items():
        if isinstance(fact, dict):
            for inner, detail in fact.items():
                table.add_row(f"{name}.{inner}", Text(_text(detail)))
        else:
            table.add_row(name, Text(_text(fact)))
    return table


def _text(fact: Any) -> str:
    return f"{fact:,}" if type(fact) is int else str(fact)
