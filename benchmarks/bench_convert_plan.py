"""How long does the plan of a 70B conversion take, and how much memory will the work need by the tool's own estimate?

The source has 80 layers of Llama 2/3's 70B sizes and 128,256 rows in bf16, 141 GB in 30 weight files whose headers are
written and whose data are holes, so no disk is used. `checkpoint convert --dry-run --json` plans and checks it to
torch_dist and to mp_rank TP8 PP4; imports are counted, and the seconds of `checkpoint show` on the same folder stand
beside them. The disk under the destination is taken to have 10 TB free, whatever it has. `--workers` is passed on where
the tool takes it; `peak_bytes` is the estimate, where it gives one.

    python benchmarks/bench_convert_plan.py --rounds 3 --output plan.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conversions import COMMAND, SEVENTY_B, Watched, add_sizes, sizes_of, watched, write_model

# The tool, on a disk that is large enough.
ROOMY = """
import shutil, sys
found = shutil.disk_usage
shutil.disk_usage = lambda path: found(path)._replace(free=10**13)
from megatron_cpt.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
COLUMNS = ("round", "what", "wall_seconds", "cpu_seconds", "peak_mib", "bytes", "estimated_peak_mib", "load")
Row = dict[str, Any]


def takes_workers() -> bool:
    """Whether `checkpoint convert` has an option for them."""
    return "--workers" in subprocess.run([*COMMAND, "convert", "--help"], capture_output=True, text=True).stdout


def row(number: int, what: str, done: Watched, load: float) -> Row:
    """Figures of one command."""
    if done.code:
        raise SystemExit(f"{what} failed: {done.last_line}")
    facts = json.loads(done.output)
    estimate = round(facts["peak_bytes"] / 2**20) if "peak_bytes" in facts else "not given"
    figures = (round(done.wall_seconds, 2), round(done.cpu_seconds, 2), round(done.peak_mib), facts.get("bytes"))
    return dict(zip(COLUMNS, (number, what, *figures, estimate, round(load, 1)), strict=True))


def report(rows: list[Row]) -> list[str]:
    """A table of medians."""
    lines = [
        "| what | wall, s | CPU, s | peak, MiB | bytes | estimate of the work's peak, MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        held = [row for row in rows if row["what"] == what]
        wall, cpu, peak = ([row[name] for row in held] for name in COLUMNS[2:5])
        lines.append(
            f"| {what} | {statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f}) "
            f"| {statistics.median(cpu):.2f} | {max(peak)} | {held[0]['bytes']:,} | {held[0]['estimated_peak_mib']} |"
        )
    return lines


def main() -> None:
    """Write the holes, plan, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, SEVENTY_B)
    parser.add_argument("--files", type=int, default=30, help="of the source")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tp", type=int, default=8, help="of the mp_rank files")
    parser.add_argument("--pp", type=int, default=4, help="of the mp_rank files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; its files may be 141 GB of holes")
    parser.add_argument("--output", type=Path, default=None, help="CSV of all runs")
    arguments = parser.parse_args()
    workers = ("--workers", str(arguments.workers)) if takes_workers() else ()
    if not workers:
        print("`checkpoint convert` takes no --workers yet: the plan is for one", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as name:
        folder = Path(name)
        total = write_model(folder / "model", sizes_of(arguments), arguments.files, sparse=True)
        print(f"{total:,} bytes of weights in {len(list(folder.glob('model/*.safetensors')))} files", flush=True)
        tool = [sys.executable, "-c", ROOMY, "checkpoint"]
        layout = ("--tp", str(arguments.tp), "--pp", str(arguments.pp))
        targets: dict[str, tuple[str, ...]] = {
            "to torch_dist": ("--to", "torch_dist"),
            f"to mp_rank {arguments.tp}x{arguments.pp}": ("--to", "mp_rank", *layout),
        }
        commands = {"show": [*tool, "show", str(folder / "model"), "--json"]}
        for what, options in targets.items():
            words = ["convert", str(folder / "model"), str(folder / "new"), *options, *workers]
            commands[what] = [*tool, *words, "--dry-run", "--json"]
        for number in range(1, arguments.rounds + 1):
            for what, words in commands.items():
                load = os.getloadavg()[0]
                rows.append(row(number, what, watched(words, folder), load))
    print("\n".join(report(rows)))
    if arguments.output is not None:
        with open(arguments.output, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
