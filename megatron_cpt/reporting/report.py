"""report.json and report.md of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import read_json, write_json_atomic, write_text_atomic
from megatron_cpt.errors import InputError
from megatron_cpt.reporting.picture import bits_per_byte_picture

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
PICTURE = "bits_per_byte.png"

# Section -> fields that every report has; "*" stands for each language.
REQUIRED: dict[str, tuple[str, ...]] = {
    "bits_per_byte.*": ("base", "after_surgery", "adapted"),
    "bytes_per_token.*": ("base", "adapted"),
    "logit_parity": ("max_abs_diff",),
    "tokenizer": ("source_lines_changed", "fast_slow_mismatches"),
    "train": ("tokens", "tokens_per_second", "bytes_per_second", "world_size", "layout"),
    "versions": (),
    "config_hash": (),
}
POINT = ("step", "language", "bits_per_byte")
UNITS = {"tokens_per_second": "tokens/s", "bytes_per_second": "bytes/s"}


def write_report(
    report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]
) -> None:
    """Write report.md with its picture, and report.json last.

    Args:
        report: at least `bits_per_byte.LANGUAGE.{base,after_surgery,adapted}`,
            `bytes_per_token.LANGUAGE.{base,adapted}`, `logit_parity.max_abs_diff`,
            `tokenizer.{source_lines_changed,fast_slow_mismatches}`,
            `train.{tokens,tokens_per_second,bytes_per_second,world_size,layout}`, `versions` and
            `config_hash`; further sections get a table of their own.
        history: points {"step", "language", "bits_per_byte"} over the adaptation; kept in
            report.json as `history`.
        folder: the run's folder.

    Raises:
        ValueError: a field is missing; a report that leaves something out is a defect of its writer.
    """
    missing = _all_missing(report)
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = {language: values["base"] for language, values in report["bits_per_byte"].items()}
    bits_per_byte_picture(history, base, folder / PICTURE)
    write_text_atomic(folder / REPORT_MD, "\n".join(_markdown(report)) + "\n")
    write_json_atomic(folder / REPORT_JSON, {**report, "history": [dict(point) for point in history]})


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the report.json of a run's folder.

    Raises:
        InputError: there is none, or it is not a whole report.
    """
    path = Path(folder) / REPORT_JSON
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected the output folder of a finished run")
    report = read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("bits_per_byte"), dict):
        raise InputError(f"{path} is not the report of a run: it has no bits_per_byte")
    missing = [*_all_missing(report), *_missing_points(report.get("history", []))]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; run the recipe again to have the whole report written")
    return report


def _all_missing(report: Mapping[str, Any]) -> list[str]:
    return [name for section, fields in REQUIRED.items() for name in _missing(report, section, fields)]


def _missing_points(history: Any) -> Iterator[str]:
    if not isinstance(history, list):
        yield "history"
        return
    for index, point in enumerate(history):
        found = point if isinstance(point, Mapping) else {}
        yield from (f"history.{index}.{field}" for field in POINT if field not in found)


def _missing(report: Mapping[str, Any], section: str, fields: tuple[str, ...]) -> Iterator[str]:
    """Names of fields that are not there; of each language they have to be numbers."""
    name, star, _ = section.partition(".*")
    values = report.get(name)
    if values is None or (fields and not isinstance(values, Mapping)) or (star and not values):
        yield name
    elif star:
        for key, row in values.items():
            found = row if isinstance(row, Mapping) else {}
            yield from (f"{name}.{key}.{field}" for field in fields if not isinstance(found.get(field), float | int))
    else:
        yield from (f"{name}.{field}" for field in fields if field not in values)


def _markdown(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"# Report: {report.get('name', 'run')}"
    yield from _bits_per_byte(report["bits_per_byte"])
    yield from _table(
        "Bytes per token", ("language", "base", "adapted", "change"), _token_rows(report["bytes_per_token"])
    )
    if "probe" in report:
        yield from _probe(report["probe"])
    if "stages" in report:
        yield from _stages(report["stages"])
    shown = {"name", "bits_per_byte", "bytes_per_token", "probe", "stages", "versions", "config_hash", "history"}
    for section in [name for name in report if name not in shown]:
        yield from _table(_title(section), ("what", "value"), _leaf_rows(report[section]))
    yield from _table(
        "Versions", ("what", "value"), [*_leaf_rows(report["versions"]), ("config hash", report["config_hash"])]
    )


def _bits_per_byte(values: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    rows = [
        (
            language,
            f"{row['base']:.4f}",
            f"{row['after_surgery']:.4f}",
            f"{row['adapted']:.4f}",
            f"{row['adapted'] - row['base']:+.4f}",
        )
        for language, row in values.items()
    ]
    columns = ("language", "base", "after surgery", "adapted", "adapted - base")
    yield from _table("Bits per byte of held-out text (less is better)", columns, rows)
    yield ""
    yield f"![Bits per byte of each language over the training steps; dashed: the base]({PICTURE})"


def _probe(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    rows = []
    for language, stages in values.items():
        cells = [f"{score['accuracy']:.3f} +- {score['standard_error']:.3f}" for score in stages.values()]
        first = next(iter(stages.values()))
        rows.append((language, *cells, f"{first['chance']:.3f}", f"{first['questions']:,}"))
    stages_named = [_words(stage) for stage in next(iter(values.values()))]
    title = "Probe: facts that only source-language text tells, asked in each language (share right, standard error)"
    yield from _table(title, ("asked in", *stages_named, "chance", "questions"), rows)


def _stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = []
    for stage in stages:
        for source in stage["sources"]:
            start, end = (f"{share:.2%}" for share in source["share"])
            share = start if start == end else f"{start} to {end}"
            rows.append((stage["name"], source["name"], share, f"{source['tokens']:,}", f"{source['epochs']:.3f}"))
    yield from _table("Stages of the training data", ("stage", "text", "share", "tokens", "epochs"), rows)


def _token_rows(values: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    return [
        (language, f"{row['base']:.3f}", f"{row['adapted']:.3f}", f"{row['adapted'] / row['base'] - 1:+.1%}")
        for language, row in values.items()
    ]


def _leaf_rows(value: Any, path: str = "") -> list[tuple[str, ...]]:
    if isinstance(value, Mapping):
        if value.keys() >= {"changed", "total"}:
            return [(path, f"{value['changed']:,} of {value['total']:,}")]
        if value.keys() >= {"mismatches", "total"}:
            return [(path, f"{value['mismatches']:,} of {value['total']:,}")]
        return [row for key, inner in value.items() for row in _leaf_rows(inner, f"{path} {_words(key)}".strip())]
    return [(path, _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _words(key: str) -> str:
    return UNITS.get(key, str(key).replace("_", " "))


def _title(key: str) -> str:
    words = _words(key)
    return words[:1].upper() + words[1:]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"
