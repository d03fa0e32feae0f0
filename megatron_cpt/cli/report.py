"""`megatron-cpt report`: a run's report again from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit

app = typer.Typer(help="Write a run's report again from its files.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    as_json: JsonOption = False,
) -> None:
    """Write report.md and its picture again from report.json, and print the report."""
    from megatron_cpt.reporting import read_report, write_report

    found = read_report(folder)
    write_report({key: value for key, value in found.items() if key != "history"}, found.get("history", []), folder)
    emit(found, as_json, lambda _: _text_of(folder))


def _text_of(folder: Path) -> Any:
    from rich.text import Text

    from megatron_cpt.reporting.report import REPORT_MD

    # Text, not a string: rich would read what stands in brackets as its own markup.
    return Text((folder / REPORT_MD).read_text(encoding="utf-8"))
