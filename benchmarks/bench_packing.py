"""How fast and how full is best-fit packing, and what does a window cost?

Lengths of documents are log-normal. "pack" is the packing in memory, "pack_dataset" the whole of
`data pack` with its files, hashed and synced; memory is what a fresh process adds to what the lengths take.
Beside the fill stand the documents that a plain concatenation of the same documents cuts, of those that
would fit. "window" is the median time of a window at a random place of a smaller dataset, warm.

    python benchmarks/bench_packing.py --documents 10000000 --output packing.csv
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data import IndexedDataset, _native, open_windows, pack_dataset
from megatron_cpt.data.writing import IndexedDatasetWriter

SIGMA = 1.2
VOCAB_SIZE = 1000
COLUMNS = ("what", "unit", "value", "low", "high", "count")


def lengths_of(documents: int, mean: float, seed: int) -> np.ndarray:
    """Log-normal lengths in tokens with this mean, at least 2."""
    draw = np.random.default_rng(seed).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, documents)
    return np.maximum(2, draw).astype(np.int64)


def row(what: str, unit: str, values: list[float]) -> dict[str, Any]:
    """Median and spread of a figure."""
    numbers = [float(f"{value:.6g}") for value in (statistics.median(values), min(values), max(values))]
    return {
        "what": what,
        "unit": unit,
        **dict(zip(("value", "low", "high"), numbers, strict=True)),
        "count": len(values),
    }


def pack_in_memory(documents: int, mean: float, seq_length: int, seed: int) -> list[float]:
    """CPU seconds, fill, share of documents that concatenation cuts, and MiB added, of this process."""
    starts = np.concatenate([[0], np.cumsum(lengths_of(documents, mean, seed))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    filler = np.ones(max(0, before * 1024 - _resident_bytes()), np.uint8)  # so that what is added shows in the peak
    begun = time.process_time()
    _, counts, borders = _native.pack(starts, seq_length)
    seconds = time.process_time() - begun
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    fits = np.diff(starts) <= seq_length
    cut = starts[:-1] // seq_length != (starts[1:] - 1) // seq_length
    fill = float(counts.sum(dtype=np.int64)) / ((len(borders) - 1) * seq_length)
    del filler
    return [seconds, fill, float((cut & fits).sum() / fits.sum()), added / 1024]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def pack_on_disk(documents: int, mean: float, seq_length: int, rounds: int) -> list[float]:
    """CPU seconds of `pack_dataset` over a dataset of one token per id, each time anew."""
    lengths = lengths_of(documents, mean, 0)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder) / "x", lengths)
        for _ in range(rounds):
            begun = time.process_time()
            pack_dataset(dataset, seq_length)
            seconds.append(time.process_time() - begun)
            for path in Path(folder).glob("x.pack-*"):
                path.unlink()
    return seconds


def write_dataset(prefix: Path, lengths: np.ndarray) -> IndexedDataset:
    """Documents of these lengths, of random ids."""
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, int(lengths.max()))
    with IndexedDatasetWriter(prefix, VOCAB_SIZE) as writer:
        for length in lengths.tolist():
            writer.add(ids[:length])
        writer.finish({})
    return IndexedDataset(prefix)


def window_times(mean: float, seq_length: int) -> list[dict[str, Any]]:
    """Microseconds of a window, by packing."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder) / "x", lengths_of(20_000, mean, 0))
        pack_dataset(dataset, seq_length)
        for packing in ("concat", "best_fit"):
            windows = open_windows(dataset, seq_length, packing)  # type: ignore[arg-type]
            medians = []
            for seed in range(5):
                numbers = np.random.default_rng(seed).integers(0, len(windows), 2000).tolist()
                took = []
                for number in numbers:
                    begun = time.perf_counter()
                    windows.window(number)
                    took.append(1e6 * (time.perf_counter() - begun))
                medians.append(statistics.median(took))
            table.append(row(f"window, {packing}", "us", medians))
    return table


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean", type=float, default=670.0)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk-documents", type=int, default=200_000, help="of the dataset that is packed on disk")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one-round", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_round is not None:
        print(*pack_in_memory(given.documents, given.mean, given.seq_length, given.one_round))
        return
    rounds = []
    for number in range(given.rounds):
        command = [sys.executable, __file__, *sys.argv[1:], "--one-round", str(number)]
        rounds.append([float(word) for word in subprocess.check_output(command, text=True).split()])
    names = (
        (f"pack {given.documents:,} documents", "CPU s"),
        ("full", "share"),
        ("whole documents that concatenation cuts", "share"),
        ("memory added", "MiB"),
    )
    table = [row(*name, list(values)) for name, values in zip(names, zip(*rounds, strict=True), strict=True)]
    on_disk = pack_on_disk(given.disk_documents, given.mean, given.seq_length, given.rounds)
    table.append(row(f"pack_dataset, {given.disk_documents:,} documents", "CPU s", on_disk))
    table += window_times(given.mean, given.seq_length)
    for each in table:
        print(f"{each['what']:<42} {each['value']:>12g} {each['unit']:<6} ({each['low']:g} to {each['high']:g})")
    if given.output:
        with open(given.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
