"""The pictures and the note of a table that `bench_kernels.py` has measured.

    python benchmarks/plot_kernels.py benchmarks/results/kernels_h200_202611.csv

Writes beside the table: its note (.md, once more), and with matplotlib time against peak memory of the loss
(<name>_memory.png) and the share of the floor of every provider (<name>_floor.png).
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from kernel_bench import note
from kernel_bench.measuring import COLUMNS, OURS

COLOURS = {OURS: "#c0392b", "torch": "#7f8c8d", "liger-kernel": "#2980b9", "cut-cross-entropy": "#27ae60"}
OTHER = "#8e44ad"


def read_table(path: Path) -> list[dict[str, str]]:
    """Returns the rows.

    Raises:
        ValueError: the file has other columns, or no rows.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS or not rows:
        found = f"{len(rows)} rows with the columns {reader.fieldnames}"
        raise ValueError(f"{path}: got {found}, expected rows of bench_kernels.py: {list(COLUMNS)}")
    return rows


def main() -> int:
    """Write the note and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the .csv")
    path: Path = parser.parse_args().table
    rows = read_table(path)
    pictures = draw(rows, path)
    text = note.write(rows, path.name)
    text += "".join(f"\n![{name.stem}]({name.name})\n" for name in pictures)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(*[path.with_suffix(".md"), *pictures], sep="\n")
    return 0


def draw(rows: list[dict[str, str]], path: Path) -> list[Path]:
    """Returns the pictures it has drawn; none, with a word on stderr, where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("plot_kernels: no pictures, as matplotlib is not installed; the note is complete", file=sys.stderr)
        return []
    drawn = []
    for name, make in (("memory", _memory), ("floor", _floor)):
        figure = make(pyplot, rows)
        if figure is not None:
            drawn.append(path.with_name(f"{path.stem}_{name}.png"))
            figure.savefig(drawn[-1], dpi=110)
            pyplot.close(figure)
    return drawn


def _colour(row: dict[str, str]) -> str:
    return COLOURS.get(row["provider"].split(" ")[0], OTHER)


def _groups(rows: list[dict[str, str]], kernel: str | None, *needed: str) -> dict[str, list[dict[str, str]]]:
    """Returns the rows that have these figures, by kernel, mode and shape."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if all(row[name] for name in needed) and kernel in (None, row["kernel"]):
            found.setdefault(f"{row['kernel']}, {row['mode']}, {row['shape']}", []).append(row)
    return found


def _memory(pyplot: Any, rows: list[dict[str, str]]) -> Any:
    """Time against peak memory, a panel for each shape of the loss; lower left is better."""
    groups = _groups(rows, note.LOSS, "p50_ms", "peak_mib")
    if not groups:
        return None
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(11, 4.5 * len(groups)), squeeze=False, layout="constrained")
    for axis, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        for number, row in enumerate(sorted(group, key=lambda row: float(row["p50_ms"])), 1):
            label = f"{number}  {row['provider']}, {row['setting']}"
            point = float(row["peak_mib"]), float(row["p50_ms"])
            axis.plot(*point, marker=f"${number}$", markersize=9, linestyle="", color=_colour(row), label=label)
        axis.axhline(float(group[0]["floor_ms"]), color="black", linewidth=0.8, linestyle=":", label="three products")
        axis.set(xscale="log", yscale="log", title=title, xlabel="peak MiB, gradients included", ylabel="ms")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=6)
    return figure


def _floor(pyplot: Any, rows: list[dict[str, str]]) -> Any:
    """Share of the floor, a bar for each provider of each comparison."""
    groups = _groups(rows, None, "fraction_of_floor")
    if not groups:
        return None
    bars = sum(len(group) + 2 for group in groups.values())
    figure, axis = pyplot.subplots(figsize=(9, 0.22 * bars + 1), layout="constrained")
    height, ticks = 0, []
    for title, group in groups.items():
        axis.text(0.0, height, title, fontsize=7, weight="bold", va="center")
        for row in sorted(group, key=lambda row: -float(row["fraction_of_floor"])):
            height += 1
            axis.barh(height, float(row["fraction_of_floor"]), color=_colour(row))
            ticks.append((height, f"{row['provider']}, {row['setting']}"))
        height += 2
    axis.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=6)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set(ylim=(height, -1), xlabel="floor / time")
    return figure


if __name__ == "__main__":
    sys.exit(main())
