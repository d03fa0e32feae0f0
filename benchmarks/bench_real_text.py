"""Does extending the vocabulary pay on real text, and what does the source language lose?

For each seed: a tiny base is trained on the source text, then adapted to the target text with replay,
once with the extended vocabulary and surgery, once without. Both arms share the base, the order rules,
the number of steps and every setting; each scores the same held-out works in bits per byte. New rows are the mean of
their pieces and no more: what calibration adds is the question of `bench_calibration.py`.

    python benchmarks/bench_real_text.py --source english.jsonl.gz --target japanese.jsonl.gz --output runs/bench
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

from megatron_cpt.config.loading import load_config
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.pipeline import run

COLUMNS = ("seed", "arm", "language", "base", "step_0", "adapted", "bytes_per_token", "tokens")


def run_arm(arguments: argparse.Namespace, seed: int, arm: str, base: Path | None) -> dict[str, Any]:
    """One arm's report; an arm that was finished before is read, not run again."""
    overrides = [
        f"output={arguments.output / f'seed{seed}-{arm}'}",
        f"seed={seed}",
        f"data.source={arguments.source}",
        f"data.target={arguments.target}",
        f"tokenizer.method={'extend' if arm == 'extended' else 'none'}",
        "surgery.calibration=null",
        *arguments.overrides,
    ]
    if base is not None:
        overrides += [f"base.path={base}", "base.shape=null", "base.train=null"]
    return run(load_config("real-text", RunConfig, overrides))


def rows(seed: int, arm: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each language."""
    return [
        {
            "seed": seed,
            "arm": arm,
            "language": language,
            "base": score["base"],
            "step_0": score["after_surgery"],
            "adapted": score["adapted"],
            "bytes_per_token": report["bytes_per_token"][language]["adapted"],
            "tokens": report["train"]["tokens"],
        }
        for language, score in report["bits_per_byte"].items()
    ]


def compare(table: list[dict[str, Any]], source: str, target: str) -> list[str]:
    """The claims, each with its value for every seed."""

    def value(seed: int, arm: str, language: str, column: str) -> float:
        return next(
            float(row[column]) for row in table if (row["seed"], row["arm"], row["language"]) == (seed, arm, language)
        )

    seeds = sorted({row["seed"] for row in table})
    claims = {
        f"{source} at step 0 - base": [
            value(s, "extended", source, "step_0") - value(s, "extended", source, "base") for s in seeds
        ],
        f"{target} adapted: plain - extended": [
            value(s, "plain", target, "adapted") - value(s, "extended", target, "adapted") for s in seeds
        ],
        f"{source} adapted: extended - plain": [
            value(s, "extended", source, "adapted") - value(s, "plain", source, "adapted") for s in seeds
        ],
        f"{source} adapted - base": [
            value(s, "extended", source, "adapted") - value(s, "extended", source, "base") for s in seeds
        ],
    }
    return [
        f"{claim:<36} mean {statistics.mean(values):+.4f}   seeds {'  '.join(f'{v:+.4f}' for v in values)}"
        for claim, values in claims.items()
    ]


def main() -> None:
    """Run the arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="source-language text")
    parser.add_argument("--target", type=Path, required=True, help="target-language text")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--csv", type=Path, help="where to write the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    table = []
    for seed in arguments.seeds:
        extended = run_arm(arguments, seed, "extended", None)
        table += rows(seed, "extended", extended)
        base = arguments.output / f"seed{seed}-extended" / "base" / "hf"
        table += rows(seed, "plain", run_arm(arguments, seed, "plain", base))
        languages = list(extended["bits_per_byte"])
        print("\n".join(compare(table, *languages)), flush=True)
        if arguments.csv:
            with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(table)


if __name__ == "__main__":
    main()
