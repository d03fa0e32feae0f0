"""How much sooner is a dataset there with two threads than with one, on how much text, and how much could it be?

Three sides in each round, in an order that turns: a build with one thread, the same with two, and two builds of one
thread at once. What the last leaves of a processor is what no second thread can gain: processors that share a core, or
are busy with something else, have less to give than two. Start of the interpreter and imports are not counted; every
build is a process of its own.

    python benchmarks/bench_threads.py --text en=novels.jsonl.gz --text en=pairs.jsonl.gz:en --tokenizer en=a.model \
        --rounds 9 --output results/threads.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_build import in_process
from corpora import named, write_plain

COLUMNS = ("text", "megabytes", "round", "side", "wall_seconds", "cpu_seconds", "load")
SIDES = ("1 thread", "2 threads", "two at once")
Row = dict[str, str | float]


def one_side(side: str, files: list[Path], tokenizer: str, scratch: Path) -> tuple[float, float, float]:
    """Megabytes of text, and wall and CPU seconds of a build (of the slower one where there are two)."""
    count = 2 if side == "two at once" else 1

    def build(number: int) -> dict[str, float]:
        return in_process("build", files, tokenizer, scratch / f"out{number}", 2 if side == "2 threads" else 1)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(build, range(count)))
    slower = max(found, key=lambda one: one["wall_seconds"])
    return slower["text_bytes"] / 1e6, slower["wall_seconds"], slower["cpu_seconds"]


def measure(name: str, files: list[Path], tokenizer: str, rounds: int, scratch: Path) -> list[Row]:
    """All sides on one corpus."""
    rows: list[Row] = []
    for turn in range(rounds):
        first = turn % len(SIDES)
        for side in SIDES[first:] + SIDES[:first]:
            megabytes, wall, cpu = one_side(side, files, tokenizer, scratch)
            row = (name, round(megabytes, 1), turn, side, round(wall, 4), round(cpu, 4), round(os.getloadavg()[0], 1))
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def summary(rows: list[Row]) -> str:
    """How many times as fast two threads are, by the medians and by the least of all rounds."""
    walls = {side: [float(row["wall_seconds"]) for row in rows if row["side"] == side] for side in SIDES}
    one, two, both = (walls[side] for side in SIDES)
    paired = [a / b for a, b in zip(one, two, strict=True)]
    return (
        f"{rows[0]['text']}: {rows[0]['megabytes']} MB; 1 thread {statistics.median(one):.3f} s, 2 threads"
        f" {statistics.median(two):.3f} s: {statistics.median(one) / statistics.median(two):.2f} times by the medians,"
        f" {min(one) / min(two):.2f} by the least of each, {min(paired):.2f} to {max(paired):.2f} by round;"
        f" two builds at once get {2 * statistics.median(one) / statistics.median(both):.2f} times as much done"
        f" ({2 * min(one) / min(both):.2f} by the least); load {rows[0]['load']} to {rows[-1]['load']}"
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE[:FIELD]")
    parser.add_argument("--tokenizer", action="append", required=True, metavar="NAME=MODEL", help="one for each NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--as-they-are", action="store_true", help="build of the files themselves, not of one of all")
    parser.add_argument("--output", type=Path, help="table of all measurements (CSV)")
    arguments = parser.parse_args()
    models = dict(given.split("=", 1) for given in arguments.tokenizer)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name, files in named(arguments.text).items():
            scratch = Path(folder)
            paths = [Path(file) for file in files]
            if not arguments.as_they_are:
                paths = [write_plain(files, scratch / f"{name}.jsonl")]
            mine = measure(name, paths, models[name], arguments.rounds, scratch)
            print(summary(mine), flush=True)
            rows += mine
    if arguments.output:
        with arguments.output.open("w", newline="") as table:
            writer = csv.DictWriter(table, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
