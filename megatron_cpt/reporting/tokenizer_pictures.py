"""The pictures of a tokenizer's report: density, coverage, lengths. No piece is written in them: fonts lack scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import temporary_path
from megatron_cpt.reporting.picture import COLOURS, apart

_BASE, _ADAPTED, _PIECES = "#9AA5B1", COLOURS[0], COLOURS[5]
_MOST_LENGTHS = 16
_CURVE_FLOOR = 0.01  # languages whose new pieces make less than this share have no curve


def draw_pictures(report: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw what a report of `compare_tokenizers` has to show.

    Returns:
        (file name, what it shows) of each picture, in the order of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [("bytes_per_token.png", "Bytes per token of each language, base and adapted")]
    _density(report["languages"], folder / drawn[-1][0])
    curves = {
        name: facts["coverage"] for name, facts in report["languages"].items() if facts["new_tokens"] >= _CURVE_FLOOR
    }
    if curves:
        drawn.append(("coverage.png", "Share of tokens that the most used new pieces make"))
        _coverage(curves, list(report["languages"]), report["new_pieces"]["count"], folder / drawn[-1][0])
    if report["new_pieces"]["lengths"]:
        drawn.append(("piece_lengths.png", "Lengths of the new pieces, in the vocabulary and in the texts"))
        _lengths(report["new_pieces"]["lengths"], report["new_pieces"]["lengths_used"], folder / drawn[-1][0])
    return drawn


def _density(languages: Mapping[str, Any], path: Path) -> None:
    figure, axes = _figure(8.0, 1.4 + 0.75 * len(languages))
    names = list(languages)
    highest = max(
        max(facts["base"]["bytes_per_token"], facts["adapted"]["bytes_per_token"]) for facts in languages.values()
    )
    for place, name in enumerate(names):
        before, after = (languages[name][side]["bytes_per_token"] for side in ("base", "adapted"))
        for offset, value, colour in ((-0.19, before, _BASE), (0.19, after, _ADAPTED)):
            axes.barh(place + offset, value, height=0.36, color=colour)
        axes.text(before + 0.012 * highest, place - 0.19, f"{before:.2f}", va="center", fontsize=10, color="#52606D")
        moved = before and abs(after / before - 1) >= 0.005
        change = f"{after:.2f}  " + (f"({after / before - 1:+.0%})" if moved else "(as before)")
        axes.text(
            after + 0.012 * highest, place + 0.19, change, va="center", fontsize=10, color=_ADAPTED, fontweight="bold"
        )
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, highest * 1.18)
    axes.set_xlabel("bytes per token (more is better)")
    axes.grid(axis="x", color="#E4E7EB", linewidth=0.8)
    axes.set_title("How much text a token holds", loc="left", fontweight="bold", pad=26)
    for place, (label, colour) in enumerate((("base", "#52606D"), ("adapted", _ADAPTED))):
        axes.annotate(
            label, (0.10 * place, 1.0), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points",
            color=colour, fontsize=10, fontweight="bold",
        )  # fmt: skip
    axes.spines["left"].set_visible(False)
    _save(figure, path)


def _coverage(
    curves: Mapping[str, Sequence[Sequence[float]]], languages: Sequence[str], count: int, path: Path
) -> None:
    figure, axes = _figure(8.0, 4.2)
    top = min(100.0, 110 * max(points[-1][1] for points in curves.values()))
    heights = apart([100 * points[-1][1] / top for points in curves.values()])
    for (name, points), height in zip(curves.items(), heights, strict=True):
        colour = COLOURS[languages.index(name) % len(COLOURS)]
        places, shares = zip(*points, strict=True)
        axes.plot(places, [100 * share for share in shares], color=colour, linewidth=2.2)
        axes.plot(places[-1], 100 * shares[-1], "o", color=colour, markersize=5, clip_on=False)
        label = f"{name} {100 * shares[-1]:.0f} %, by {places[-1]:,}"
        where = {"xy": (1.015, height), "xycoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(label, color=colour, fontsize=10, fontweight="bold", **where)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(1, count)
    axes.set_ylim(0, top)
    axes.set_xlabel(f"number of new pieces, the most used first, to all {count:,} (logarithmic)")
    axes.set_ylabel("share of all tokens, %")
    axes.grid(color="#E4E7EB", linewidth=0.8)
    axes.set_title("What the new pieces carry", loc="left", fontweight="bold")
    _save(figure, path)


def _lengths(pieces: Mapping[int, int], used: Mapping[int, int], path: Path) -> None:
    figure, axes = _figure(8.0, 3.6)
    longest = min(max(pieces), _MOST_LENGTHS)
    for offset, counts, colour, label in (
        (-0.2, pieces, _PIECES, "of the pieces"),
        (0.2, used, _ADAPTED, "of their uses in the texts"),
    ):
        total = max(sum(counts.values()), 1)
        shares = [100 * counts.get(length, 0) / total for length in range(1, longest)]
        shares.append(100 * sum(number for length, number in counts.items() if length >= longest) / total)
        axes.bar([length + offset for length in range(1, longest + 1)], shares, width=0.4, color=colour, label=label)
    marks = [str(length) for length in range(1, longest + 1)]
    marks[-1] += "+" if max(pieces) > longest else ""
    axes.set_xticks(range(1, longest + 1), marks)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("characters of a new piece")
    axes.set_ylabel("share, %")
    axes.grid(axis="y", color="#E4E7EB", linewidth=0.8)
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    axes.set_title("How long the new pieces are", loc="left", fontweight="bold")
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    temporary = temporary_path(path)
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)
