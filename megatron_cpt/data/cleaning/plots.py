"""Plots of the distributions that rules cut: one picture a family of figures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.config.manifest import temporary_path

# Okabe and Ito's colours, told apart by every kind of colour vision.
KEPT_COLOUR, DROPPED_COLOUR, BOUND_COLOUR = "#0072B2", "#E69F00", "#D55E00"
_COLUMNS = 3
_FAMILIES = {
    "sizes": "How long texts are",
    "characters": "What the text is made of",
    "shape": "How lines and words look",
    "repetition": "How often the text repeats itself",
    "scores": "What the models say",
}


def family_of(metric: str) -> str:
    """The picture that a figure belongs to."""
    if metric.startswith(("duplicate_", "top_", "repeated_")):
        return "repetition"
    if "length" in metric or metric in ("bytes", "characters", "words", "lines", "sentences", "japanese_characters"):
        return "sizes"
    if metric in ("ellipsis_sentence_share", "ellipsis_line_share", "bullet_line_share", "ended_line_share"):
        return "shape"
    if metric.startswith(("hash_", "ellipsis_", "stop_", "alphabetic_", "run_", "longest_", "link_")):
        return "shape"
    return "characters" if metric.endswith(("_share", "_of_japanese")) else "scores"


def draw_plots(histograms: Mapping[str, Any], rules: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw the histograms, with the bounds of the rules, into a folder that is made anew.

    Args:
        histograms: metric -> {"scale", "edges", "kept", "dropped"}: counts in bins, and the bins' borders.
        rules: name -> {"metric", "at_least", "at_most", "broken"}.
        folder: where the pictures go.

    Returns:
        Names of the PNG files, in the order of the families.
    """
    shutil.rmtree(folder, ignore_errors=True)
    families: dict[str, list[str]] = {name: [] for name in _FAMILIES}
    for metric, histogram in histograms.items():
        if _tells_something(histogram, [rule for rule in rules.values() if rule["metric"] == metric]):
            families[family_of(metric)].append(metric)
    names = []
    for family, metrics in families.items():
        if metrics:
            folder.mkdir(parents=True, exist_ok=True)
            names.append(f"{family}.png")
            _draw(_FAMILIES[family], {metric: histograms[metric] for metric in metrics}, rules, folder / names[-1])
    return names


def _tells_something(histogram: Mapping[str, Any], rules: list[Mapping[str, Any]]) -> bool:
    """Whether a document breaks a rule, or the figure is not (nearly) the same for all."""
    used = sum(kept + dropped > 0 for kept, dropped in zip(histogram["kept"], histogram["dropped"], strict=True))
    return used > 1 or (used > 0 and any(rule["broken"] for rule in rules))


def _draw(title: str, histograms: Mapping[str, Any], rules: Mapping[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(histograms))
    rows = -(-len(histograms) // columns)
    figure = Figure(figsize=(max(4.0 * columns, 6.5), 2.6 * rows + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(histograms) :]:
        axes.set_visible(False)
    for axes, (metric, histogram) in zip(grid, histograms.items(), strict=False):
        _draw_metric(axes, metric, histogram, [rule for rule in rules.values() if rule["metric"] == metric])
    for row in range(rows):
        grid[row * columns].set_ylabel("documents (logarithmic)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    temporary = temporary_path(path)
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _draw_metric(axes: Any, metric: str, histogram: Mapping[str, Any], rules: list[Mapping[str, Any]]) -> None:
    scale, edges = histogram["scale"], np.array(histogram["edges"])
    kept, dropped = np.array(histogram["kept"]), np.array(histogram["dropped"])
    if scale == "size":
        edges[0] = 10**-0.1  # what is below 1 has the first bin
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    used = np.flatnonzero(kept + dropped)
    bounds = [rule[side] for rule in rules for side in ("at_least", "at_most") if rule[side] is not None]
    low = min([edges[used[0]], *(bound for bound in bounds if bound > 0 or scale == "share")])
    high = max([edges[used[-1] + 1], *bounds])
    left, right = _limits(low, high, scale)
    # Outlines, each with its own counts: heights that are stacked or filled cannot be compared on this axis.
    axes.stairs(kept, edges, color=KEPT_COLOUR, linewidth=1.4, label="kept by the rules")
    axes.stairs(dropped, edges, color=DROPPED_COLOUR, linewidth=1.4, label="dropped by a rule")
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_ylim(0, max(*kept, *dropped) * 2)
    axes.set_xlim(left, right)
    if scale == "size" and right < 30 * left:  # powers of ten alone would be one or two marks
        axes.set_xticks([mark for mark in _marks() if left <= mark <= right])
    for rule in rules:
        for side, end in (("at_least", left), ("at_most", right)):
            if rule[side] is not None:
                axes.axvspan(rule[side], end, color=BOUND_COLOUR, alpha=0.12, linewidth=0)
                axes.axvline(rule[side], color=BOUND_COLOUR, linestyle=(0, (4, 3)), linewidth=1.3)
    broken = sum(rule["broken"] for rule in rules)
    axes.set_title(f"{metric}  ({broken:,} break it)", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _marks() -> list[float]:
    return [digit * 10**power for power in range(-1, 8) for digit in (1, 2, 5)]


def _short(value: float) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _limits(low: float, high: float, scale: str) -> tuple[float, float]:
    if scale == "size":
        return max(low, 10**-0.1) / 1.3, high * 1.3
    margin = 0.04 * (high - low) or 0.02
    return max(low - margin, -0.02), min(high + margin, 1.02)
