"""What cleaning has counted: merged block by block, kept in a journal as JSON, told by the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data import _native
from megatron_cpt.data.cleaning.normalise import Change
from megatron_cpt.data.cleaning.plugins import Scale
from megatron_cpt.data.cleaning.profiles import Rule

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Counts = dict[str, Any]

SAMPLES = 5  # shown of what each rule drops and of what each step changes
SAMPLE_CHARACTERS = 160
_SHARE_EDGES = np.linspace(0.0, 1.0, 51)
_SIZE_EDGES = np.concatenate([[0.0], 10.0 ** np.linspace(0.0, 7.0, 71)])


def scale_of(metric: str) -> Scale:
    """How the figures of `_native.text_metrics` are drawn."""
    is_share = "share" in metric or "ratio" in metric or "_of_" in metric
    is_repetition = metric.startswith(("duplicate_", "top_", "repeated_"))
    return "share" if is_share or is_repetition else "size"


def edges_of(scale: Scale, rules: Iterable[Rule]) -> Floats:
    """Borders of the bins of a histogram: regular ones, and the bounds of the rules, so that no bin lies across one.

    A value belongs to the bin that begins with it or before it; what lies outside counts in the outermost.
    """
    lows = [rule.at_least for rule in rules if rule.at_least is not None]
    highs = [np.nextafter(rule.at_most, np.inf) for rule in rules if rule.at_most is not None]
    regular = _SHARE_EDGES if scale == "share" else _SIZE_EDGES
    return np.unique(np.concatenate([regular, np.array(lows), np.array(highs)]))


def histogram(values: Floats, edges: Floats) -> list[int]:
    """Number of values in each bin; a figure that is not a number is in none."""
    places = np.searchsorted(edges, values[~np.isnan(values)], "right") - 1
    return np.bincount(np.clip(places, 0, len(edges) - 2), minlength=len(edges) - 1).tolist()  # type: ignore[no-any-return]


def merge(total: Counts, more: Mapping[str, Any]) -> None:
    """Add `more` to `total`: numbers and lists of numbers are added, samples compete."""
    for key, value in more.items():
        if isinstance(value, dict):
            merge(total.setdefault(key, {}), value)
        elif key == "samples":
            total[key] = sorted([*total.get(key, []), *value], key=lambda sample: sample["draw"])[:SAMPLES]
        elif isinstance(value, list):
            held = total.get(key)
            total[key] = value if held is None else [a + b for a, b in zip(held, value, strict=True)]
        else:
            total[key] = total.get(key, 0) + value


@dataclass(frozen=True)
class Place:
    """Number of a file among the inputs, and of a block in it."""

    part: int
    block: int

    def draw(self, document: int) -> int:
        """A number that decides, the same on every run, whether a document of the block is shown."""
        key = _native.derive(_native.derive(self.part, self.block), document)
        return key >> 11  # readers of JSON know 53 bits


def shorten(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]}..."


def pick(chosen: Bools, block: _native.Block, place: Place) -> list[dict[str, Any]]:
    """Samples of some documents of a block: draw, line, id, beginning of the text, place in the block."""
    documents = np.flatnonzero(chosen).tolist()
    documents = sorted(documents, key=lambda document: place.draw(document))[:SAMPLES]
    mask = np.zeros(len(block), bool)
    mask[documents] = True
    shown = block.select(mask)
    fields = zip(sorted(documents), shown.lines.tolist(), shown.ids(), shown.texts(), strict=True)
    return [
        {"draw": place.draw(document), "line": line, "id": id, "text": shorten(text), "document": document}
        for document, line, id, text in fields
    ]


def count_rules(
    rules: Mapping[str, Rule],
    metrics: Mapping[str, Floats],
    judged: tuple[npt.NDArray[np.uint8], Bools],
    block: _native.Block,
    place: Place,
) -> Counts:
    """Documents and bytes that each rule drops first, and all documents that break it, with samples."""
    verdicts, broken = judged
    counts: Counts = {}
    for row, (name, rule) in enumerate(rules.items()):
        dropped = verdicts == row + 1
        counts[name] = {"broken": int(broken[row].sum()), **count_documents(dropped, block, place)}
        for sample in counts[name]["samples"]:
            sample["value"] = float(metrics[rule.metric][sample.pop("document")])
    return counts


def count_documents(chosen: Bools, block: _native.Block, place: Place) -> Counts:
    """Documents and bytes of a mask, with samples."""
    samples = pick(chosen, block, place) if chosen.any() else []
    return {"documents": int(chosen.sum()), "bytes": int(block.document_bytes[chosen].sum()), "samples": samples}


def count_changes(changes: Sequence[Change], block: _native.Block, place: Place) -> Counts:
    """Documents and characters that each step changed, with samples."""
    counts: Counts = {}
    lines = block.lines
    for change in changes:
        sample = {
            "draw": place.draw(change.document),
            "line": int(lines[change.document]),
            "before": change.before,
            "after": change.after,
        }
        one = {"documents": 1, "characters": change.characters, "samples": [sample]}
        merge(counts.setdefault(change.step, {}), one)
    return counts


def count_histograms(metrics: Mapping[str, Floats], edges: Mapping[str, Floats], kept: Bools) -> Counts:
    """Distributions of the figures that rules look at: of the documents that the rules keep, and of the others."""
    return {
        metric: {"kept": histogram(metrics[metric][kept], bins), "dropped": histogram(metrics[metric][~kept], bins)}
        for metric, bins in edges.items()
    }
