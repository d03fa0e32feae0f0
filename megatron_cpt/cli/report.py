"""`megatron-cpt report`: what runs have reached, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit

app = typer.Typer(help="Show what runs have reached, side by side.")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of finished runs.")],
    as_json: JsonOption = False,
) -> None:
    """Print bits per byte, bytes per token and speed of one or several runs."""
    from megatron_cpt.reporting import read_report

    emit({"runs": {str(folder): read_report(folder) for folder in folders}}, as_json, _render)


def _render(value: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for column in ("run", "language", "base", "after surgery", "adapted", "change", "bytes/token", "tokens/s"):
        table.add_column(column, justify="left" if column in ("run", "language") else "right")
    for folder, run in value["runs"].items():
        for number, (language, bits) in enumerate(run["bits_per_byte"].items()):
            lengths = run["bytes_per_token"][language]
            table.add_row(
                folder if number == 0 else "",
                language,
                *(f"{bits[moment]:.4f}" for moment in ("base", "after_surgery", "adapted")),
                f"{bits['adapted'] - bits['base']:+.4f}",
                f"{lengths['base']:.2f} -> {lengths['adapted']:.2f}",
                f"{run['train']['tokens_per_second']:,.0f}" if number == 0 else "",
            )
    return table
