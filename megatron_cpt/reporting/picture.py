"""The one picture of a report: bits per byte of each language over the run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import temporary_path

# Okabe and Ito's colours, told apart by every kind of colour vision; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OFF_SCALE = 1.3  # a base level above this multiple of the highest point is not drawn
LABEL_HEIGHT = 0.055  # of the axis: one line of text and a little air


def bits_per_byte_picture(
    history: Sequence[Mapping[str, Any]], base: Mapping[str, float], path: str | os.PathLike[str]
) -> None:
    """Draw bits per byte over training steps, one line a language, the base's level dashed.

    Args:
        history: points {"step", "language", "bits_per_byte"} of held-out text, in any order.
        base: bits per byte of the base model on the same text, before anything was changed. A level
            far above every line is named at the top instead of drawn: it would flatten the lines.
        path: the PNG to write, replaced as a whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines_by_language(history)
    highest = max((value for points in lines.values() for _, value in points), default=float("inf"))
    shown = {language: level for language, level in base.items() if level <= OFF_SCALE * highest}
    languages = list(dict.fromkeys([*base, *lines]))
    figure = Figure(figsize=(8.0, 4.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, language in enumerate(languages):
        colour = COLOURS[number % len(COLOURS)]
        if language in shown:
            axes.axhline(shown[language], color=colour, linestyle=(0, (4, 3)), linewidth=1.2, alpha=0.75)
        if language in lines:
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*lines[language], strict=True), color=colour, marker=marker, markersize=4.5, linewidth=2)
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per byte of held-out text (less is better)")
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label_directly(axes, languages, lines, base)
    path = Path(path)
    temporary = temporary_path(path)
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _lines_by_language(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in sorted(history, key=lambda point: point["step"]):
        lines.setdefault(point["language"], []).append((point["step"], point["bits_per_byte"]))
    return lines


def _label_directly(
    axes: Any, languages: Sequence[str], lines: Mapping[str, list[tuple[int, float]]], base: Mapping[str, float]
) -> None:
    """Write name and figure beside the end of each line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    labels = []
    for number, language in enumerate(languages):
        colour = COLOURS[number % len(COLOURS)]
        if language in base:
            above = " (off the scale)" if base[language] > high else ""
            labels.append((min(base[language], high), f"{language} base {base[language]:.3f}{above}", colour, "normal"))
        if language in lines:
            end = lines[language][-1][1]
            labels.append((end, f"{language} {end:.3f}", colour, "bold"))
    places = apart([(value - low) / (high - low) for value, *_ in labels])
    for (_, text, colour, weight), place in zip(labels, places, strict=True):
        place_of = {"xy": (1.015, place), "xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(text, color=colour, fontsize=10, fontweight=weight, **place_of)


def apart(places: Sequence[float]) -> list[float]:
    """Heights at least one label apart, in the same order, as near to the wanted ones as is simple."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    result = list(places)
    for below, above in zip(order, order[1:], strict=False):
        result[above] = max(result[above], result[below] + LABEL_HEIGHT)
    # What was pushed out at the top comes back down, and pushes the ones below it.
    limit = 1.0
    for index in reversed(order):
        result[index] = min(result[index], limit)
        limit = result[index] - LABEL_HEIGHT
    return result
