"""`megatron-cpt data clean`: corpus files to the documents worth training on, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_cpt.cli.console import DryRunOption, JsonOption, SetOption, emit, progress
from megatron_cpt.cli.data.build import shard_of
from megatron_cpt.cli.data.cluster import RayOption, WorkersOption


def clean(
    files: Annotated[list[Path], typer.Argument(help="Corpus: .jsonl or .txt (also .gz, .zst), or .parquet.")],
    profile: Annotated[str, typer.Option(help="Profile by name (ja-web, ko-web, prose, ...) or a YAML file.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: SetOption = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    workers: WorkersOption = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only judge every N-th file from the I-th (from 0).")] = "",
    on_error: Annotated[str, typer.Option(metavar="stop|skip", help="What to do at a broken record.")] = "stop",
    ray: RayOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished cleaning.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Drop what a profile's rules and duplicates say, and write why to OUTPUT/report.md.

    Stopped at any moment, the same command goes on. With --shard I/N (I from 0) several machines judge their
    files first; the command without it does the rest. With --ray the files, and the search for duplicates, are
    tasks of a Ray cluster that is already running, on a file system that all its hosts mount.
    """
    from megatron_cpt.data.cleaning import clean_files, load_profile

    resolved = load_profile(profile, overrides or [])
    if dry_run:
        emit(_plan_of(files, resolved.config, resolved.dump()), as_json, lambda value: Text(value["profile"]))
        return
    with progress(f"Cleaning into {output}") as advance:
        report = clean_files(
            files,
            output,
            resolved.config,
            workers=workers,
            shard=shard_of(shard),
            text_field=text_field,
            on_error=on_error,
            overwrite=overwrite,
            ray=ray,
            on_progress=advance,
            notice=lambda text: typer.echo(text, err=True),
        )
    shown = {key: value for key, value in report.items() if key not in ("histograms", "profile")}
    emit({"output": str(output), **shown}, as_json, _show)


def _plan_of(files: list[Path], profile: Any, dump: str) -> dict[str, Any]:
    from megatron_cpt.data.blocks import kind_of
    from megatron_cpt.data.cleaning.passes import scorers_of

    for file in files:
        kind_of(file)
    scorers_of(profile)
    return {"files": {str(file): file.stat().st_size for file in files}, "profile": dump}


def _show(report: dict[str, Any]) -> RenderableType:
    if "totals" not in report:
        return Text(f"{report['judged_files']} files judged, {report['files_left']} left")
    totals, documents = report["totals"], max(report["totals"]["documents"], 1)
    table = Table(box=None)
    for name in ("", "documents", "share"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [("read", totals["documents"])]
    rows += [(f"dropped: {name}", rule["documents"]) for name, rule in report["rules"].items() if rule["documents"]]
    rows += [(f"dropped: {kind} duplicate", report["duplicates"][kind]["documents"]) for kind in ("exact", "near")]
    rows.append(("written", totals["kept_documents"]))
    for name, count in rows:
        table.add_row(name, f"{count:,}", f"{100 * count / documents:.1f} %")
    for reason, count in report["faults"].items():
        table.add_row(f"no document: {reason}", f"{count:,}", "")
    return Group(table, Text(f"report: {Path(report['output']) / 'report.md'}"))
