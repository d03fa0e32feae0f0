"""comparison.json, comparison.csv and comparison.md: arms side by side, at the same steps, over seeds."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import write_json_atomic, write_text_atomic
from megatron_cpt.reporting.comparison_picture import comparison_picture
from megatron_cpt.reporting.curves import Curve, first_at, mean_with_interval, value_at
from megatron_cpt.reporting.markdown import table

COMPARISON_JSON = "comparison.json"
COMPARISON_CSV = "comparison.csv"
COMPARISON_MD = "comparison.md"
PICTURE = "comparison.png"
_CSV_COLUMNS = ("arm", "seed", "language", "step", "bits_per_byte")
_FROM_FACTS = ("name", "languages", "seeds", "controls", "train_steps", "tokens_per_step", "failed", "versions")


def write_comparison(facts: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the table, the page with its picture, and comparison.json last.

    Args:
        facts: `name`, `languages.{source,target}`, `seeds`, `controls`, `train_steps`, `eval_interval_steps`,
            `tokens_per_step`, `failed`, `versions`, `config_hash`, and `arms`: name -> `begins_with`,
            `steps_of_calibration` and `runs`: seed -> `history`, `bytes`, and perhaps `certificate`.
        folder: where to write.

    Returns:
        The report, as in comparison.json (see `report_of`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = report_of(facts)
    curves = {arm: found["curves"] for arm, found in report["arms"].items()}
    comparison_picture(curves, list(report["languages"].values()), folder / PICTURE)
    write_text_atomic(folder / COMPARISON_CSV, _csv(curves))
    write_text_atomic(folder / COMPARISON_MD, "\n".join(_page(report)) + "\n")
    write_json_atomic(folder / COMPARISON_JSON, report)
    return report


def report_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a comparison.

    A step counts what an arm has read: the curve of one that was calibrated begins behind the steps that it trains
    less. Differences and steps are of the same seed on both sides, then averaged.

    Returns:
        Some of the facts, `columns` (steps of the tables), `base` (language -> bits per byte before surgery) and
        `arms`: name -> `begins_with`, `steps_of_calibration`, `bytes` (of text that was trained on), `curves`
        (language -> seed -> [step, bits per byte]), `bits_per_byte` (language -> column -> mean with interval) and
        `against`: control -> `difference` (language -> mean with interval, at the last step) and `reaches`, its
        last value in the target language: by how many seeds, after how many `steps` and what `share` of its own.
    """
    languages = list(facts["languages"].values())
    columns = _columns(facts["train_steps"], facts["eval_interval_steps"])
    curves = {name: _curves(arm, languages) for name, arm in facts["arms"].items()}
    controls = [name for name in facts["controls"] if curves[name][languages[0]]]
    arms = {}
    for name, arm in facts["arms"].items():
        arms[name] = {
            "begins_with": arm["begins_with"],
            "steps_of_calibration": arm["steps_of_calibration"],
            "bytes": _mean([run["bytes"] for run in arm["runs"].values()]),
            "curves": curves[name],
            "bits_per_byte": {language: _at_columns(curves[name][language], columns) for language in languages},
            "against": {
                control: _against(curves[name], curves[control], languages) for control in controls if control != name
            },
        }
    return {
        **{key: facts[key] for key in _FROM_FACTS},
        "interval": "95 %, Student's t over the seeds",
        "columns": columns,
        "base": _base(facts, languages),
        "arms": arms,
        "config_hash": facts["config_hash"],
    }


def _columns(train_steps: int, interval: int | None) -> list[int]:
    """0, the evaluation's interval, doubled again and again, and the last step."""
    columns = [0]
    step = interval or train_steps
    while step < train_steps:
        columns.append(step)
        step *= 2
    return [*columns, train_steps]


def _curves(arm: Mapping[str, Any], languages: Sequence[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    shift = arm["steps_of_calibration"]
    return {
        language: {
            seed: [(p["step"] + shift, p["bits_per_byte"]) for p in run["history"] if p["language"] == language]
            for seed, run in arm["runs"].items()
        }
        for language in languages
    }


def _at_columns(curves: Mapping[str, Curve], columns: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in columns:
        values = [curve[0][1] if column == 0 else value_at(curve, column) for curve in curves.values()]
        known = [value for value in values if value is not None]
        found[str(column)] = mean_with_interval(known) if known and len(known) == len(values) else None
    return found


def _against(
    mine: Mapping[str, Mapping[str, Curve]], control: Mapping[str, Mapping[str, Curve]], languages: Sequence[str]
) -> dict[str, Any]:
    target = languages[-1]
    seeds = [seed for seed in mine[target] if seed in control[target]]
    if not seeds:
        return {}
    difference = {
        language: mean_with_interval([mine[language][seed][-1][1] - control[language][seed][-1][1] for seed in seeds])
        for language in languages
    }
    steps = [first_at(mine[target][seed], control[target][seed][-1][1]) for seed in seeds]
    reached = [step for step in steps if step is not None]
    last = control[target][seeds[0]][-1][0]
    reaches: dict[str, Any] = {"seeds": len(seeds), "reached": len(reached), "steps": None, "share": None}
    if len(reached) == len(seeds):
        reaches |= {
            "steps": mean_with_interval(reached),
            "share": mean_with_interval([step / last for step in reached]),
        }
    return {"difference": difference, "reaches": reaches}


def _base(facts: Mapping[str, Any], languages: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of the base before surgery, as far as an arm's certificate says it."""
    runs: dict[str, Any] = {}
    for arm in facts["arms"].values():
        runs |= {seed: run["certificate"] for seed, run in arm["runs"].items() if "certificate" in run}
    scores = {
        language: [found["bits_per_byte"][language]["before"] for found in runs.values()] for language in languages
    }
    return {language: mean_with_interval(values) for language, values in scores.items() if values}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _csv(curves: Mapping[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for arm, by_language in curves.items():
        for language, by_seed in by_language.items():
            for seed, points in by_seed.items():
                writer.writerows((arm, seed, language, step, value) for step, value in points)
    return file.getvalue()


def _page(report: Mapping[str, Any]) -> Iterator[str]:
    arms = report["arms"]
    done = sorted({seed for arm in arms.values() for curves in arm["curves"].values() for seed in curves}, key=int)
    total = report["train_steps"] * report["tokens_per_step"]
    yield from (f"# {report['name']}", "")
    yield (
        f"{len(arms)} arms, {report['train_steps']:,} steps of {report['tokens_per_step']:,} tokens ({total:,} tokens "
        f"each), seeds {', '.join(done)} of {len(report['seeds'])}. Bits per byte of held-out text, less is better; "
        f"+- is half the interval ({report['interval']})."
    )
    yield from ("", f"![Bits per byte of each arm over the training steps]({PICTURE})", "")
    for title, head, rows in summary_tables(report):
        yield from (f"## {title}", "", *table(head, rows))
    yield from ("## Arms", "")
    arm_rows = [
        (name, arm["begins_with"], str(arm["steps_of_calibration"]), _count(arm["bytes"])) for name, arm in arms.items()
    ]
    yield from table(("arm", "begins with", "steps of calibration", "bytes trained on"), arm_rows)
    if any(arm["steps_of_calibration"] for arm in arms.values()):
        yield from (_OF_CALIBRATION, "")
    if report["failed"]:
        yield from ("## Failed", "", *(f"- {place}: {error}" for place, error in report["failed"].items()), "")


_OF_CALIBRATION = (
    "What calibration reads is taken off an arm's training and counted as steps: its curve begins behind them, column "
    "0 shows where it begins, and values between two evaluations stand on the line between them."
)


def summary_tables(report: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """The tables of a comparison, each as (title, head, rows of words)."""
    for number, language in enumerate(report["languages"].values()):
        side = ("source", "target")[number]
        yield f"{language} ({side}): bits per byte after each number of steps", *_values(report, language)
    for control in report["controls"]:
        yield f"Against {control}", *_differences(report, control)


def _values(report: Mapping[str, Any], language: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = [str(column) for column in report["columns"]]
    rows = []
    if base := report["base"].get(language):
        rows.append(("(base, before surgery)", with_interval(base), *("-" for _ in columns[1:])))
    for name, arm in report["arms"].items():
        found = arm["bits_per_byte"][language]
        rows.append((name, *(with_interval(found[column]) for column in columns)))
    return ("arm", *columns), rows


def _differences(report: Mapping[str, Any], control: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    languages, target = report["languages"].values(), report["languages"]["target"]
    rows = []
    for name, arm in report["arms"].items():
        if found := arm["against"].get(control):
            differences = [with_interval(found["difference"][language], "+.4f") for language in languages]
            rows.append((name, *differences, *_reaches(found["reaches"])))
    ends = (f"{language} at the end, minus {control}" for language in languages)
    return ("arm", *ends, f"steps to its last {target} value", "share of its steps"), rows


def _reaches(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["steps"] is None:
        return f"reached by {found['reached']} of {found['seeds']} seeds", "-"
    return with_interval(found["steps"], ".1f"), with_interval(found["share"], ".1%")


def with_interval(found: Mapping[str, Any] | None, form: str = ".4f") -> str:
    """A mean and half its interval, for people."""
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:{form}}"
    return f"{found['mean']:{form}} +- {found['high'] - found['mean']:{form.lstrip('+')}}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
