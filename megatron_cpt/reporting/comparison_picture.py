"""The picture of a comparison: bits per byte of each arm over the steps, one panel for each language."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import temporary_path
from megatron_cpt.reporting.picture import COLOURS, MARKERS, apart

LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # arms beyond the colours begin the colours anew with another line
DASHES = ("", "- - ", "\N{MIDDLE DOT}\N{MIDDLE DOT}\N{MIDDLE DOT} ")  # the same lines, before an arm's name
OFF_SCALE = 1.5  # what lies above this multiple of the median start is cut off: it would flatten the rest


def comparison_picture(
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]],
    languages: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw the mean over seeds of each arm, and the range of the seeds around it.

    Args:
        curves: arm -> language -> seed -> points (step, bits per byte).
        languages: one panel each, in this order.
        path: the PNG to write, replaced as a whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0 * len(languages), 5.0), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, language in zip(figure.subplots(1, len(languages), squeeze=False)[0], languages, strict=True):
        _panel(axes, {arm: by_language[language] for arm, by_language in curves.items() if by_language[language]})
        axes.set_title(language, loc="left", fontweight="bold")
        axes.set_xlabel("step")
    figure.axes[0].set_ylabel("bits per byte of held-out text (less is better)")
    path = Path(path)
    temporary = temporary_path(path)
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _panel(axes: Any, arms: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    drawn = {arm: _mean_and_range(list(seeds.values())) for arm, seeds in arms.items()}
    for number, (steps, means, lows, highs) in enumerate(drawn.values()):
        colour, style = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(steps, means, color=colour, linestyle=style, marker=marker, markersize=3.5, linewidth=1.6)
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        _cut(axes, [means for _, means, _, _ in drawn.values()])
        _label(axes, {arm: means[-1] for arm, (_, means, _, _) in drawn.items()})


def _mean_and_range(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], ...]:
    """Steps, means, lowest and highest values at the steps that all seeds have."""
    values = [dict(curve) for curve in curves]
    steps = [step for step in values[0] if all(step in each for each in values)]
    columns = [[each[step] for each in values] for step in steps]
    return steps, list(map(statistics.fmean, columns)), list(map(min, columns)), list(map(max, columns))


def _cut(axes: Any, lines: Sequence[Sequence[float]]) -> None:
    """Show from the lowest value up to the highest start that is not far above most others."""
    limit = OFF_SCALE * statistics.median(line[0] for line in lines)
    low = min(min(line) for line in lines)
    high = max(value for line in lines for value in line if value <= limit)
    margin = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)
    if any(value > limit for line in lines for value in line):
        axes.annotate("values above are cut off", (0.99, 0.99), xycoords="axes fraction", ha="right", va="top")


def _label(axes: Any, ends: Mapping[str, float]) -> None:
    """Write name and last value beside the end of each line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    places = apart([min(max((value - low) / (high - low), 0.0), 1.0) for value in ends.values()])
    for number, ((arm, value), place) in enumerate(zip(ends.items(), places, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        at = {"xy": (1.015, place), "xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        dashes = DASHES[number // len(COLOURS) % len(LINES)]
        axes.annotate(f"{dashes}{arm} {value:.3f}", color=colour, fontsize=9, **at)
