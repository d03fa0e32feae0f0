"""How fast, how exact and how lean are the kernels, beside what else can be installed, and how near their floors?

One process measures everything: first what the GPU can do at most (bf16 products, copies), then each op at each
shape, all providers on the same inputs in turns. A provider that cannot run has a row that says why. Times are of
the device, with a cold L2, without the wait for Python; errors are relative 2-norms against float64.

    python benchmarks/bench_kernels.py                           all, into results/kernels_<gpu>_<yyyymm>.csv and .md
    python benchmarks/bench_kernels.py --only attention --minutes 3 --output attention.csv
    python benchmarks/bench_kernels.py --sweep --only streams    time launch settings; print entries for the tables
    python benchmarks/bench_kernels.py --dry-run                 on the CPU, tiny, interpreted: shows that all runs

Needs torch and Triton; whichever peers are installed take part. What a dry run measures says nothing, so it goes to
a temporary folder.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = {"cross_entropy": 0.5, "attention": 0.32, "streams": 0.18}  # shares of the time


def main() -> int:
    """Measure, and write the table and a note; 1 where there is no GPU."""
    arguments = _arguments()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path.insert(0, str(ROOT))
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        message = "no NVIDIA GPU is visible to torch: run it on a machine with one, or with --dry-run on this CPU"
        print(f"bench_kernels: {message}", file=sys.stderr)
        return 1
    from kernel_bench import sweep
    from kernel_bench.machine import Machine
    from kernel_bench.measuring import Results

    machine = Machine(arguments.dry_run, arguments.commit)
    path = arguments.output or _default_output(machine.facts["gpu"], arguments.dry_run)
    if arguments.dry_run and RESULTS in path.resolve().parents:
        print(f"bench_kernels: a dry run is no result; give an --output outside {RESULTS}", file=sys.stderr)
        return 2
    results = Results(path, machine)
    shares = {name: SECTIONS[name] for name in arguments.only or SECTIONS}
    minutes = {name: arguments.minutes * share / sum(shares.values()) for name, share in shares.items()}
    if arguments.sweep:
        sweep.run(machine, results, minutes)
    else:
        measure_all(machine, results, minutes)
    print(f"wrote {path}")
    return 0


def measure_all(machine: Any, results: Any, minutes: dict[str, float]) -> None:
    """Measures the ceilings, the sections in their time, and the ceilings again; writes the note."""
    from kernel_bench import attention, cross_entropy, note, streams
    from kernel_bench.ceilings import measure_ceilings
    from kernel_bench.machine import Budget
    from kernel_bench.measuring import measure, reason_of

    modules = {"cross_entropy": cross_entropy, "attention": attention, "streams": streams}
    ceilings = measure_ceilings(machine, results)
    for section, share in minutes.items():
        budget = Budget(60 * share)
        for name, make in modules[section].comparisons(machine, ceilings):
            if budget.left() <= 0:
                results.add([{"kernel": name, "reason": f"not run: the {budget.seconds:.0f} s of {section} were over"}])
                continue
            try:
                machine.free()
                results.add(measure(make(), machine, budget))
            except Exception as error:  # as out of memory for the float64 truth: the other comparisons go on
                results.add([{"kernel": name, "reason": reason_of(error)}])
    measure_ceilings(machine, results, when="last")
    text = note.write(results.rows, results.path.name)
    results.path.with_suffix(".md").write_text(text, encoding="utf-8")


def _default_output(gpu: str, dry: bool) -> Path:
    if dry:
        return Path(tempfile.mkdtemp(prefix="bench_kernels_")) / "kernels_dry_run.csv"
    name = gpu.lower().replace("nvidia", "").split()[0]
    return RESULTS / f"kernels_{name}_{datetime.date.today():%Y%m}.csv"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the table, .csv; the note is written beside it")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), help="sections to measure (all)")
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="for the sections together (6); a piece that has begun ends"
    )
    parser.add_argument("--sweep", action="store_true", help="time launch settings instead")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--commit", default="", help="what stands in the rows where git cannot be asked")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"got --minutes {arguments.minutes}, expected a number above 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
