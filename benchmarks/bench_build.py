"""How fast does a corpus become a dataset, in bytes of text per CPU second, and in how much memory?

Our side is the whole command from jsonl to .bin, .idx and manifest, hashes, self-check and fsync included, without
the start of the interpreter. Beside it stand, in the same rounds: gigatoken's encoder alone (texts already in memory,
model already loaded, nothing written) and Megatron-LM's preprocess_data.py (its start, measured with a corpus of one
document, is taken off). Every measurement is a process of its own, so nothing is warm but the page cache. Megatron's
tokens must be the same as ours, or the run ends.

    python benchmarks/bench_build.py --text en=english.jsonl.gz --tokenizer en=tokenizer.model --rounds 5 \
        --megatron-lm ../Megatron-LM --output results/build.csv
The newest preprocess_data.py that runs on Python 3.11 beside megatron-core 0.16 is that of the tag core_v0.15.0, with
the megatron folder of that tag; it needs the package six.

    python benchmarks/bench_build.py --memory 10 --tokenizer en=tokenizer.model
"""

from __future__ import annotations

import argparse
import csv
import filecmp
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from corpora import named, write_plain

COLUMNS = ("language", "round", "what", "text_bytes", "tokens", "cpu_seconds", "wall_seconds", "resident_mib")


def build(files: list[str], tokenizer: str, output: str, workers: int) -> dict[str, Any]:
    """Our command; returns its counts."""
    from megatron_cpt.data import DatasetBuild, build_files

    started = time.process_time(), time.monotonic()
    made = build_files(DatasetBuild(files, tokenizer, output, "", append_bos=False), workers=workers, overwrite=True)
    return {**_spent(started), "text_bytes": made["text_bytes"], "tokens": made["tokens"] - made["documents"]}


def gigatoken(files: list[str], tokenizer: str, output: str, workers: int) -> dict[str, Any]:
    """gigatoken's encoder on texts in memory, one thread, in batches of about 1 MiB as it is meant to be called."""
    del output, workers
    import gigatoken as peer

    texts = [
        json.loads(line)["text"]
        for file in files
        for line in Path(file).read_text(encoding="utf-8").split("\n")
        if line
    ]
    text_bytes = sum(len(text.encode()) for text in texts)
    model = peer.Tokenizer.from_sentencepiece(tokenizer)
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size > 1 << 20:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    started = time.process_time(), time.monotonic()
    encoded = [model.encode_batch(batch, parallel=False) for batch in batches]
    spent = _spent(started)
    import awkward

    return {**spent, "text_bytes": text_bytes, "tokens": sum(int(awkward.count(ids)) for ids in encoded)}


def _spent(started: tuple[float, float]) -> dict[str, Any]:
    return {
        "cpu_seconds": time.process_time() - started[0],
        "wall_seconds": time.monotonic() - started[1],
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_process(what: str, files: list[Path], tokenizer: str, output: Path, workers: int = 1) -> dict[str, Any]:
    """One measurement in a fresh interpreter."""
    words = [sys.executable, __file__, "--child", what, "--workers", str(workers), "--tokenizer", tokenizer]
    done = subprocess.run(
        [*words, "--output", str(output), "--text", *map(str, files)], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def preprocess_data(folder: Path, file: Path, tokenizer: str, output: Path) -> dict[str, float]:
    """CPU and wall seconds of Megatron-LM's script with one worker, its start included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    words = ["--input", str(file), "--output-prefix", str(output), "--tokenizer-model", tokenizer, "--workers", "1"]
    command = [sys.executable, str(folder / "tools" / "preprocess_data.py"), "--tokenizer-type", "Llama2Tokenizer"]
    subprocess.run([*command, *words, "--append-eod"], check=True, capture_output=True, env=_environment(folder))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "wall_seconds": time.monotonic() - started}


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def measure(language: str, file: Path, tokenizer: str, scratch: Path, arguments: argparse.Namespace) -> list[Any]:
    """All sides on one corpus, one after the other in each round, in an order that turns."""
    rows: list[dict[str, Any]] = []
    single = scratch / "one.jsonl"
    single.write_text('{"text": "a"}\n')
    for turn in range(arguments.rounds):
        sides = ["build", "gigatoken", "build, 2 threads"] + (["preprocess_data"] if arguments.megatron_lm else [])
        for what in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            if what == "preprocess_data":
                start = preprocess_data(arguments.megatron_lm, single, tokenizer, scratch / "start")
                found: dict[str, Any] = preprocess_data(arguments.megatron_lm, file, tokenizer, scratch / "theirs")
                found = {name: found[name] - start[name] for name in found}
            elif what == "gigatoken":
                found = in_process("gigatoken", [file], tokenizer, scratch / "none")
            else:
                found = in_process("build", [file], tokenizer, scratch / "ours", 2 if "2" in what else 1)
            rows.append({"language": language, "round": turn, "what": what, **found})
            print({name: round(v, 3) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    counts = sorted({row["tokens"] for row in rows if "tokens" in row})
    print(f"{language}: tokens {counts}; gigatoken takes the spelling of a special token in a text for the token")
    if counts[-1] - counts[0] > counts[0] * 1e-4:
        raise SystemExit(f"{language}: the encoders differ; no comparison can be made")
    if arguments.megatron_lm and not filecmp.cmp(scratch / "theirs_text_document.bin", scratch / "ours.bin", False):
        raise SystemExit(f"{language}: preprocess_data.py gives other tokens; no comparison can be made")
    return rows


def summary(rows: list[dict[str, Any]], language: str) -> None:
    """Ratios round by round: their median, least and most."""
    mine = [row for row in rows if row["language"] == language]
    text_bytes = next(row["text_bytes"] for row in mine if "text_bytes" in row)

    def column(what: str, name: str) -> list[float]:
        return [row[name] for row in sorted(mine, key=lambda row: row["round"]) if row["what"] == what]

    for what in dict.fromkeys(row["what"] for row in mine):
        rate = statistics.median(text_bytes / 1e6 / seconds for seconds in column(what, "cpu_seconds"))
        print(f"{language}: {what}: {rate:.1f} MB of text per CPU second")
    pairs = [("gigatoken", "cpu_seconds", "build"), ("preprocess_data", "cpu_seconds", "build")]
    for other, name, ours in [*pairs, ("build", "wall_seconds", "build, 2 threads")]:
        ratios = [theirs / own for theirs, own in zip(column(other, name), column(ours, name), strict=False)]
        if ratios:
            print(
                f"{language}: {ours} against {other}, {name}: {statistics.median(ratios):.2f} times "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


def memory(gigabytes: float, tokenizer: str, scratch: Path, workers: int) -> None:
    """Resident memory of our command on made-up text of any size."""
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(50000)]
    path = scratch / "large.jsonl"
    with path.open("w") as file:
        while file.tell() < gigabytes * 1e9:
            lines = (" ".join(draw.choices(words, k=draw.randint(10, 1200))) for _ in range(400))
            file.write("".join(f'{{"text": "{line}"}}\n' for line in lines))
    found = in_process("build", [path], tokenizer, scratch / "large", workers)
    print(f"{path.stat().st_size / 1e9:.1f} GB, {workers} threads: {found}")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], help="LANGUAGE=FILE[:FIELD]...")
    parser.add_argument("--tokenizer", nargs="+", required=True, help="LANGUAGE=MODEL for each language")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megatron-lm", type=Path, help="checkout of a Megatron-LM that fits the megatron-core here")
    parser.add_argument("--memory", type=float, help="GB of made-up text: measure resident memory instead")
    parser.add_argument("--workers", type=int, default=2, help="threads of the memory run")
    parser.add_argument("--output", type=Path, help="table of all measurements (CSV)")
    parser.add_argument("--child", choices=("build", "gigatoken"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side = build if arguments.child == "build" else gigatoken
        print(json.dumps(side(arguments.text, arguments.tokenizer[0], str(arguments.output), arguments.workers)))
        return
    models = dict(given.split("=", 1) for given in arguments.tokenizer)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        scratch, rows = Path(folder), []
        if arguments.memory:
            memory(arguments.memory, next(iter(models.values())), scratch, arguments.workers)
            return
        texts = named(arguments.text)
        for language, files in texts.items():
            rows += measure(
                language, write_plain(files, scratch / f"{language}.jsonl"), models[language], scratch, arguments
            )
        for language in texts:
            summary(rows, language)
    if arguments.output:
        with arguments.output.open("w", newline="") as table:
            writer = csv.DictWriter(table, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
