"""What a cleaning has done, for programs (`report.json`) and for people (`report.md` and its plots)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import write_json_atomic, write_text_atomic
from megatron_cpt.data.cleaning.normalise import STEPS
from megatron_cpt.data.cleaning.passes import Job, axes_of
from megatron_cpt.data.cleaning.plots import draw_plots
from megatron_cpt.data.cleaning.plugins import Scorer
from megatron_cpt.data.cleaning.tally import Counts, merge

Report = dict[str, Any]
State = tuple[Counts, Counts]  # of the two walks over one file


def make_report(
    job: Job, scorers: Mapping[str, Scorer], inputs: Sequence[str], outputs: Sequence[str], states: Sequence[State]
) -> Report:
    """The counts of all files together.

    Args:
        job: what was done.
        scorers: the scorers of its profile.
        inputs: the files.
        outputs: name of what was written of each, "" where nothing was.
        states: what the two walks have counted in each.
    """
    judged: Counts = {}
    written: Counts = {}
    files = []
    for path, name, (first, second) in zip(inputs, outputs, states, strict=True):
        _name_file(first, path)
        _name_file(second, path)
        merge(judged, first)
        merge(written, second)
        sizes = {key: first.get(key, 0) for key in ("documents", "bytes")}
        kept = {f"kept_{key}": second.get(key, 0) for key in ("documents", "bytes")}
        files.append({"input": path, "output": name, **sizes, **kept})
    held = judged.get("histograms", {})
    axes = axes_of(job.profile, scorers) if held else {}
    return {
        "profile": job.profile.model_dump(mode="json", include={"about", "language", "sources", "deviations"}),
        "totals": {
            "documents": judged.get("documents", 0),
            "bytes": judged.get("bytes", 0),
            "kept_documents": written.get("documents", 0),
            "kept_bytes": written.get("bytes", 0),
            "changed_documents": judged.get("changed_documents", 0),
            "faults": sum(judged.get("faults", {}).values()),
        },
        "rules": {
            name: {"condition": rule.condition, **rule.model_dump(), **judged.get("rules", {}).get(name, _NO_RULE)}
            for name, rule in job.profile.active_rules.items()
        },
        "duplicates": {kind: written.get(f"{kind}_duplicates", _NOTHING) for kind in ("exact", "near")},
        "changes": {
            name: {"does": _first_clause(STEPS[name].__doc__ or ""), **judged.get("changes", {}).get(name, _NO_CHANGE)}
            for name in job.profile.normalise
        },
        "faults": judged.get("faults", {}),
        "files": files,
        "histograms": {
            metric: {"scale": scale, "edges": edges.tolist(), **held[metric]} for metric, (scale, edges) in axes.items()
        },
    }


_NOTHING: Counts = {"documents": 0, "bytes": 0, "samples": []}
_NO_RULE: Counts = {"broken": 0, **_NOTHING}
_NO_CHANGE: Counts = {"documents": 0, "characters": 0, "samples": []}


def _first_clause(docstring: str) -> str:
    return " ".join(docstring.split("\n\n")[0].split(";")[0].split()).rstrip(".")


def _name_file(counts: Any, path: str) -> None:
    """Say in every sample which file it comes from."""
    for key, value in counts.items():
        if key == "samples":
            for sample in value:
                sample["file"] = path
        elif isinstance(value, dict):
            _name_file(value, path)


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and the plots of the distributions into a folder."""
    plots = draw_plots(report["histograms"], report["rules"], folder / "plots")
    write_json_atomic(folder / "report.json", report)
    write_text_atomic(folder / "report.md", "\n".join(_lines(report, [f"plots/{name}" for name in plots])) + "\n")


def _lines(report: Report, plots: Sequence[str]) -> Iterable[str]:
    totals, profile = report["totals"], report["profile"]
    yield f"# Cleaning: {profile['about']}"
    yield ""
    yield (
        f"Of {totals['documents']:,} documents ({_size(totals['bytes'])}) **{totals['kept_documents']:,} stay** "
        f"({_percent(totals['kept_documents'], totals['documents'])} of the documents, {_size(totals['kept_bytes'])}, "
        f"{_percent(totals['kept_bytes'], totals['bytes'])} of the text)."
    )
    yield ""
    yield from _reasons(report)
    yield from _balance(report)
    yield from _rules(report)
    yield from _distributions(plots)
    yield from _dropped(report)
    yield from _duplicates(report)
    yield from _changes(report)
    yield from _faults(report)
    yield from _files(report)
    for title, key in (("Sources of the rules", "sources"), ("Where they differ from their sources", "deviations")):
        if profile[key]:
            yield from (f"## {title}", "", *(f"- {line}" for line in profile[key]), "")


def _reasons(report: Report) -> Iterable[str]:
    """What dropped most, in a sentence."""
    total = report["totals"]["documents"]
    counts = [(rule["documents"], name, rule["reason"]) for name, rule in report["rules"].items()]
    counts += [
        (report["duplicates"][kind]["documents"], f"{kind} duplicates", "an earlier document stays")
        for kind in ("exact", "near")
    ]
    most = sorted((count for count in counts if count[0]), key=lambda count: -count[0])[:3]
    if most:
        said = [f"**{name}** {_percent(count, total)} ({reason})" for count, name, reason in most]
        yield f"What dropped most: {'; '.join(said)}."
        yield ""


def _balance(report: Report) -> Iterable[str]:
    totals, duplicates = report["totals"], report["duplicates"]
    by_rules = [sum(rule[key] for rule in report["rules"].values()) for key in ("documents", "bytes")]
    rows = [("read", totals["documents"], totals["bytes"]), ("dropped by rules", by_rules[0], by_rules[1])]
    rows += [
        (f"{name} duplicates dropped", duplicates[kind]["documents"], duplicates[kind]["bytes"])
        for kind, name in (("exact", "exact"), ("near", "near"))
    ]
    rows.append(("**written**", totals["kept_documents"], totals["kept_bytes"]))
    yield from _table(
        ("", "documents", "share", "text"),
        [(name, f"{count:,}", _percent(count, totals["documents"]), _size(size)) for name, count, size in rows],
    )
    changed = totals["changed_documents"]
    yield (
        f"Normalisation changed {changed:,} documents; the size of what is written is that of the changed text."
        if (changed)
        else "No text was changed."
    )
    yield ""


def _rules(report: Report) -> Iterable[str]:
    documents = report["totals"]["documents"]
    if not report["rules"]:
        return
    yield from ("## Rules", "")
    yield "A document is dropped by the first rule it breaks; *breaking* counts all that break the rule."
    yield ""
    at_work = {name: rule for name, rule in report["rules"].items() if rule["documents"]}
    late = [
        f"{name} ({rule['broken']:,})"
        for name, rule in report["rules"].items()
        if rule["broken"] and not rule["documents"]
    ]
    idle = [name for name, rule in report["rules"].items() if not rule["broken"]]
    rows = [
        (
            name,
            f"`{rule['condition']}`",
            f"{rule['documents']:,}",
            _percent(rule["documents"], documents),
            _size(rule["bytes"]),
            f"{rule['broken']:,}",
            rule["reason"],
        )
        for name, rule in at_work.items()
    ]
    yield from _table(("rule", "a document stays if", "dropped", "share", "text", "breaking", "against"), rows)
    if late:
        yield f"Broken only by documents that an earlier rule had dropped: {', '.join(late)}."
        yield ""
    if idle:
        yield f"Broken by no document: {', '.join(idle)}."
        yield ""


def _distributions(plots: Sequence[str]) -> Iterable[str]:
    if plots:
        yield from ("## Distributions", "")
        yield (
            "Documents that the rules keep and drop, each counted from 0 on a logarithmic axis; what lies in a shaded "
            "area breaks a rule of its figure, and a bin that a bound cuts is two narrower ones."
        )
        yield ""
        for plot in plots:
            yield from (f"![{Path(plot).stem}]({plot})", "")


def _dropped(report: Report) -> Iterable[str]:
    at_work = {name: rule for name, rule in report["rules"].items() if rule["samples"]}
    if at_work:
        yield from ("## What the rules dropped", "", "Drawn at random; long texts are cut.", "")
    for name, rule in at_work.items():
        yield f"**{name}** (`{rule['condition']}`): {rule['reason']}"
        yield ""
        yield from (
            f"- {rule['metric']} = {sample['value']:.4g}, {_place(sample)}: {_quoted(sample['text'])}"
            for sample in rule["samples"]
        )
        yield ""


def _duplicates(report: Report) -> Iterable[str]:
    search = report["duplicates"].get("search")
    if search is None:
        yield from ("## Duplicates", "", "Not looked for.", "")
        return
    yield from ("## Duplicates", "")
    yield (
        f"Of the {search['documents']:,} documents that the rules keep, {search['exact_duplicates']:,} repeat an "
        f"earlier one exactly and {search['near_duplicates']:,} nearly (shingles of {search['shingle_characters']} "
        f"characters, estimated Jaccard index at least {search['threshold']:g}). {_largest(search)}A pair of index "
        + ", ".join(f"{index} is found with chance {chance:.3f}" for index, chance in _chances(search))
        + "."
    )
    yield ""
    for kind in ("exact", "near"):
        for sample in report["duplicates"][kind]["samples"]:
            yield f"- {kind}, {_place(sample)} repeats {Path(sample['original']).name}: {_quoted(sample['text'])}"
    yield ""


def _largest(search: Report) -> str:
    clusters, largest = search["clusters"], search["largest_cluster"]
    return f"The largest of {clusters:,} clusters has {largest:,} documents. " if clusters else ""


def _chances(search: Report) -> list[tuple[str, float]]:
    near = round(search["threshold"] / 0.05) * 0.05
    wanted = [f"{index:.2f}" for index in (near - 0.1, near, near + 0.1)]
    return [
        (index, search["chance_of_comparison"][index]) for index in wanted if index in search["chance_of_comparison"]
    ]


def _changes(report: Report) -> Iterable[str]:
    if not report["changes"]:
        return
    yield from ("## Normalisation", "")
    rows = [
        (name, f"{change['documents']:,}", f"{change['characters']:,}", change["does"])
        for name, change in report["changes"].items()
    ]
    yield from _table(("step", "documents", "characters", "what it does"), rows)
    for name, change in report["changes"].items():
        for sample in change["samples"]:
            yield f"- {name}, {_place(sample)}: {_code(sample['before'])} became {_code(sample['after'])}"
    yield ""


def _faults(report: Report) -> Iterable[str]:
    if report["faults"]:
        yield from ("## Records left out", "", "Each with its line in `faults.log`.", "")
        yield from (f"- {count:,}: {reason}" for reason, count in report["faults"].items())
        yield ""


def _files(report: Report) -> Iterable[str]:
    yield from ("## Files", "")
    rows = [
        (
            file["input"],
            f"{file['documents']:,}",
            _size(file["bytes"]),
            f"{file['kept_documents']:,}",
            _percent(file["kept_documents"], file["documents"]),
            file["output"] or "nothing to write",
        )
        for file in report["files"]
    ]
    yield from _table(("file", "documents", "text", "stay", "share", "written"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    numbers = [bool(rows) and all(re.match(r"[\d<]", row[column]) for row in rows) for column in range(len(head))]
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---:' if number else '---' for number in numbers)}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _place(sample: Report) -> str:
    return f"{Path(sample['file']).name}:{sample['line']}"


def _quoted(text: str) -> str:
    shown = " ".join("".join(c if c.isprintable() else " " for c in text.replace("\n", " / ")).split())
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", shown)


def _code(text: str) -> str:
    shown = "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" for c in text.replace("\n", "⏎"))
    return f"`` {shown} ``"


def _percent(part: float, whole: float) -> str:
    if not part or not whole:
        return "0 %"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.1 else f"{share:.1f} %"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
