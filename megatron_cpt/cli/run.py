"""`megatron-cpt run`: the whole path of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, SetOption, emit, stdout_for_results

app = typer.Typer(help="Walk the whole path of a recipe.")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (quickstart, real-text) or a YAML file.")],
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Base, tokenizer, surgery, data, training, export, report; each step is done once."""
    from megatron_cpt.cli.plan import describe, render
    from megatron_cpt.config.loading import load_config
    from megatron_cpt.config.schema import RunConfig

    resolved = load_config(recipe, RunConfig, overrides or [])
    plan = describe(resolved)  # an impossible layout is refused before anything is made
    if dry_run:
        from megatron_cpt.pipeline.corpus import open_corpora

        if resolved.config.data.builtin is None:
            open_corpora(resolved.config.data)  # refuses texts that are not there
        emit(plan, as_json, lambda value: render(value, resolved))
        return
    from megatron_cpt.pipeline import run as walk

    with stdout_for_results(as_json):
        report = walk(resolved)
    emit(report, as_json, lambda value: _summary(value, resolved.config.output))


def _summary(report: dict[str, Any], output: str) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="bits per byte of held-out text (less is better)", title_justify="left", box=None, header_style=""
    )
    for name in ("language", "base", "after surgery", "adapted", "bytes/token base", "adapted"):
        table.add_column(name, justify="left" if name == "language" else "right")
    for language, row in report["bits_per_byte"].items():
        lengths = report["bytes_per_token"][language]
        stages = [f"{row[stage]:.4f}" for stage in ("base", "after_surgery", "adapted")]
        table.add_row(language, *stages, f"{lengths['base']:.2f}", f"{lengths['adapted']:.2f}")
    return Group(Text(""), table, Text(f"\nmodel:  {output}/hf\nreport: {output}/report.md"))
