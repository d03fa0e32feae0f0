"""How soon is the order of a run known, in how much memory, and what does a sample cost?

Start: a plan of `--tokens` tokens in samples of 4,096, eight sources, six stages whose shares move: CPU seconds
to compile it in a fresh interpreter and the growth of its resident memory, no data at hand. Beside it what
megatron-core needs before its first sample: its three indices, by its own code, for `--mcore-tokens` tokens in
documents of 670 tokens on average; they grow with the tokens, ours do not.
Sample: wall-clock microseconds of `sample(i)` at random i of the same plan over synthetic datasets that lie in
the page cache; and of `place(i)` alone, the part that is the order.

    python benchmarks/bench_order.py --output order.csv

megatron-core is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.config.schema import Stage
from megatron_cpt.data import SamplePlan, Source
from megatron_cpt.data.writing import IndexedDatasetWriter

LENGTH, NUM_SOURCES, NUM_STAGES, VOCAB_SIZE, MEAN_DOCUMENT = 4096, 8, 6, 32_000, 670
COLUMNS = ("measure", "what", "value", "low", "high", "count")
Row = tuple[str, str, float, float, float, int]


def stages_of(tokens: int) -> list[Stage]:
    """Six stages in which every share moves from one value to another."""
    stages = []
    for number in range(NUM_STAGES):
        draw = random.Random(number)
        shares = [
            {"sources": [f"s{source}"], "share": [float(draw.randint(1, 1000)), float(draw.randint(1, 1000))]}
            for source in range(NUM_SOURCES)
        ]
        stage = {"name": f"stage {number}", "tokens": tokens // NUM_STAGES, "shares": shares}
        stages.append(Stage.model_validate_json(json.dumps(stage)))
    return stages


def start(tokens: int) -> None:
    """In a fresh process: print CPU seconds and bytes that compiling the plan takes."""
    import psutil

    from megatron_cpt.data.stages import Order, SourceFacts

    stages = stages_of(tokens)
    facts = [SourceFacts(f"s{n}", f"{n:064x}", tokens // LENGTH // NUM_SOURCES) for n in range(NUM_SOURCES)]
    memory, begun = psutil.Process().memory_info().rss, time.process_time()
    order = Order(facts, stages, LENGTH, 1)
    seconds = time.process_time() - begun
    assert order.num_samples is not None and order.num_samples >= tokens // LENGTH - NUM_STAGES
    print(seconds, psutil.Process().memory_info().rss - memory)


def mcore_start(tokens: int) -> None:
    """In a fresh process: print CPU seconds and bytes that megatron-core's indices take."""
    import psutil
    from megatron.core.datasets import helpers

    draw = np.random.RandomState(1)
    sizes = np.clip(draw.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1, tokens // MEAN_DOCUMENT), 2, None).astype(np.int32)
    memory, begun = psutil.Process().memory_info().rss, time.process_time()
    documents = np.arange(len(sizes), dtype=np.int32)
    draw.shuffle(documents)
    samples = helpers.build_sample_idx(sizes, documents, LENGTH, 1, int(sizes.sum()))
    order = np.arange(len(samples) - 1, dtype=np.uint32)
    draw.shuffle(order)
    print(time.process_time() - begun, psutil.Process().memory_info().rss - memory)


def starts(what: str, tokens: int, rounds: int) -> Iterator[Row]:
    """CPU seconds and MB of one of the two, each round in a process of its own."""
    found = []
    for _ in range(rounds):
        command = [sys.executable, __file__, "--start", what, "--tokens", str(tokens)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        found.append((float(printed[-2]), float(printed[-1]) / 1e6))
    title = f"{what}, {tokens / 1e9:g} B tokens"
    for name, values in zip(("start, CPU seconds", "start, MB"), zip(*found, strict=True), strict=True):
        yield name, title, statistics.median(values), min(values), max(values), rounds


def write_sources(folder: Path, tokens: int) -> list[Source]:
    """Eight datasets of random ids, of `tokens` tokens each."""
    sources = []
    for number in range(NUM_SOURCES):
        draw = np.random.default_rng(number)
        lengths = np.clip(draw.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1, tokens // MEAN_DOCUMENT), 2, None)
        lengths = lengths.astype(np.int32)
        prefix = folder / f"s{number}"
        with IndexedDatasetWriter(prefix, VOCAB_SIZE) as writer:
            writer.add_documents(draw.integers(0, VOCAB_SIZE, int(lengths.sum()), np.uint16), lengths)
            writer.finish({}, language="xx", bytes_per_token=4.0)
        sources.append(Source(prefix, "xx"))
    return sources


def micros(call: Callable[[int], Any], numbers: list[int]) -> list[float]:
    """Wall-clock microseconds of each call."""
    found = []
    for number in numbers:
        begun = time.perf_counter()
        call(number)
        found.append((time.perf_counter() - begun) * 1e6)
    return found


def samples(tokens: int, rounds: int) -> Iterator[Row]:
    """Microseconds of a sample and of its place: median over the samples of a round, and the 99th percentile."""
    with tempfile.TemporaryDirectory() as folder:
        plan = SamplePlan(write_sources(Path(folder), 8_000_000), LENGTH, 1, stages_of(tokens))
        assert plan.num_samples is not None
        draw = random.Random(1)
        calls: dict[str, Callable[[int], Any]] = {"sample(i)": plan.sample, "place(i)": plan.place}
        for name, call in calls.items():
            runs = [micros(call, [draw.randrange(plan.num_samples) for _ in range(4000)]) for _ in range(rounds)]
            for measure, cut in (("median, us", 0.5), ("99th percentile, us", 0.99)):
                values = [float(np.quantile(run, cut)) for run in runs]
                yield measure, name, statistics.median(values), min(values), max(values), rounds


def main() -> None:
    """Measure, print and, if asked for, write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**12)
    parser.add_argument("--mcore-tokens", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--start", choices=("ours", "megatron-core"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        (start if options.start == "ours" else mcore_start)(options.tokens)
        return
    rows = [*starts("ours", options.tokens, options.rounds), *samples(options.tokens, options.rounds)]
    if importlib.util.find_spec("megatron"):
        rows += starts("megatron-core", options.mcore_tokens, options.rounds)
    for measure, what, value, low, high, _ in rows:
        print(f"{measure:<20} {what:<32} {value:10.3f}  ({low:.3f} to {high:.3f})")
    if options.output:
        with open(options.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
