"""Does megatron-core, loading what `checkpoint convert` writes, compute transformers' logits in every layout?

Four tiny Llamas (plain, rope scaled by 8, tied and scaled by 32, heads wider than hidden size / heads) are converted
and loaded by unmodified megatron-core in real processes over gloo, TP 1, 2, 4 x PP 1, 2, 4 and VPP 2. Written for
each: the largest difference of fp32 logits from transformers' relative to the largest logit, over a short text and
over one longer than the 8192 positions from which Llama 3 was extended, there for the positions beyond 8192 too.
Last, a run is trained at TP 2 x PP 2 x DP 2 and every weight of every rank is looked for in its export.
It uses the jobs of the tests, so it runs from the repository; a layout takes as many processes as it has ranks.

    python benchmarks/bench_convert_layouts.py --output convert_layouts.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the jobs of the tests

from tests.checkpoint.conftest import write_model
from tests.checkpoint.llama_kinds import KINDS, VOCAB_SIZE, random_tokens, relative_error, transformers_logits
from tests.checkpoint.megatron_slices import Layout
from tests.checkpoint.test_megatron import LAYOUTS, STORED, Job
from tests.training.conftest import make_tiny
from tests.training.test_layouts import check_export

SCALED_FROM = 8192
COLUMNS = ("stored", "model", "layout", "processes", "tokens", "relative_error", "relative_error_beyond_8192", "equal")


def logits_of_all(folder: Path, lengths: list[int]) -> list[dict[str, Any]]:
    """A row for each format, model, layout and length."""
    job = Job(folder)
    expected = {}
    for length in lengths:
        tokens = random_tokens(1, length)
        torch.save(tokens, folder / f"{length}.pt")
        for name, changes in KINDS.items():
            hf = folder / name / "hf"
            if not hf.exists():
                write_model(hf, VOCAB_SIZE, **changes)
            expected[name, length] = transformers_logits(hf, tokens)
            for kind in STORED:
                for layout in LAYOUTS:
                    job.add(hf, kind, layout, f"{name}-{length}", folder / f"{length}.pt")
    job.run(timeout_seconds=None)
    table = []
    for (name, length), logits in expected.items():
        for kind in STORED:
            for layout in LAYOUTS:
                found = job.output(kind, layout, f"{name}-{length}")[..., :VOCAB_SIZE]
                beyond = found[:, SCALED_FROM:], logits[:, SCALED_FROM:]
                table.append(
                    {
                        "stored": kind,
                        "model": name,
                        "layout": layout.name,
                        "processes": layout.world_size,
                        "tokens": length,
                        "relative_error": f"{relative_error(found, logits):.2e}",
                        "relative_error_beyond_8192": f"{relative_error(*beyond):.2e}" if length > SCALED_FROM else "",
                        "equal": "",
                    }
                )
    return table


def export_of_training(folder: Path) -> dict[str, Any]:
    """Train at TP 2 x PP 2 x DP 2, export, and compare with what the eight ranks held."""
    tiny = make_tiny(folder, 250)
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    tiny.train_many({"TP2-PP2-DP2": {"parallel": parallel}}, 8)
    compared = check_export(tiny, "TP2-PP2-DP2", Layout(2, 2), 8, folder / "exported")
    return {"stored": "torch_dist, trained", "layout": "TP2-PP2-DP2", "processes": 8, "equal": f"{compared} weights"}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 8500], help="tokens of a text")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for part in ("converted", "trained"):
            (Path(folder) / part).mkdir()
        table = logits_of_all(Path(folder) / "converted", given.lengths)
        table.append(export_of_training(Path(folder) / "trained"))
    for row in table:
        print(*(row.get(name, "") for name in COLUMNS), sep="  ")
    if given.output:
        with open(given.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
