"""Time and peak memory of the surgery methods that need vectors, each in a process of its own.

Synthetic tables: as many new pieces as shared ones, a helper (CLP, the pursuit's donor) of width 512, static
vectors of 100 numbers (FOCUS), and a model of width 4,096 in bf16 whose rows are made at the end. With `--text`,
`--old-tokenizer` and `--new-tokenizer` the methods that read text are measured on them too.

    python benchmarks/bench_surgery_methods.py --output results.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint import EMBEDDING, open_hf
from megatron_cpt.config.surgery import ClpMethod, OmpMethod, parse_method
from megatron_cpt.data import read_documents
from megatron_cpt.surgery import Inputs, MatrixPlan, RowMaker, RowMix
from megatron_cpt.surgery.methods import make_matrix
from megatron_cpt.surgery.methods.pursuit import matching_pursuit
from megatron_cpt.surgery.methods.similarity import sparsemax_weights, unit
from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer, map_vocabularies

HELPER_WIDTH, STATIC_WIDTH, MODEL_WIDTH = 512, 100, 4096
SYNTHETIC = ("clp topk", "clp clamped", "focus weights", "omp")
WITH_TEXT = ("aligned", "focus")


def main() -> None:
    """Measure each arm in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_000, help="shared pieces, and new ones")
    parser.add_argument(
        "--omp-rows", type=int, default=256, help="new pieces of the pursuit, its cost is linear in them"
    )
    parser.add_argument("--omp-width", type=int, default=HELPER_WIDTH, help="width of the pursuit's donor")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--old-tokenizer")
    parser.add_argument("--new-tokenizer")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--helper", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(",".join(map(str, measure(options))))
        return
    arms = options.arms or [*SYNTHETIC, *(WITH_TEXT if options.text else ())]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if any(arm.startswith("clp") for arm in arms):
            write_helper(Path(folder), 2 * options.rows)
        for arm in arms:
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--helper", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append([arm, *done.stdout.strip().splitlines()[-1].split(","), f"{os.getloadavg()[0]:.1f}"])
            print(rows[-1], flush=True)
    header = ["method", "new", "shared", "weights_s", "weights_cpu_s", "rows_s", "rows_cpu_s", "weights_per_row"]
    header += ["peak_mib", "load"]
    if options.output:
        with options.output.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


def measure(options: argparse.Namespace) -> Sequence[object]:
    """New and shared pieces; seconds and CPU seconds to the weights, and to the rows; weights a row; peak MiB."""
    begun = time.monotonic(), time.process_time()
    plan, shared = weights(options)
    spent = [f"{now - then:.1f}" for now, then in zip((time.monotonic(), time.process_time()), begun, strict=True)]
    old_VD = torch.empty(plan.mix.num_old_rows, MODEL_WIDTH, dtype=torch.bfloat16).normal_(0, 0.02)
    begun = time.monotonic(), time.process_time()
    for block in RowMaker(plan, old_VD).blocks():
        assert bool(block.isfinite().all())
    spent += [f"{now - then:.1f}" for now, then in zip((time.monotonic(), time.process_time()), begun, strict=True)]
    per_row = float(plan.mix.indptr.diff()[plan.new_rows].double().mean())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return len(plan.new_rows), shared, *spent, f"{per_row:.1f}", f"{peak:.0f}"


def weights(options: argparse.Namespace) -> tuple[MatrixPlan, int]:
    """The plan of one matrix, and how many pieces are shared."""
    rows = options.rows
    if options.arm.startswith("clp"):
        method = ClpMethod(method="clp", helper=options.helper, form=options.arm.split()[1])
        return make_matrix(method, synthetic_map(rows, rows), 0), rows
    if options.arm == "focus weights":
        vectors = table(2 * rows, STATIC_WIDTH)
        return as_plan(sparsemax_weights(vectors[rows:], vectors[:rows]), rows), rows
    if options.arm == "omp":
        vectors = table(rows + options.omp_rows, options.omp_width)
        num_atoms = OmpMethod(method="omp", donor="").num_atoms
        return as_plan(matching_pursuit(vectors[rows:], vectors[:rows], num_atoms), rows), rows
    old, new = load_tokenizer(options.old_tokenizer), load_tokenizer(options.new_tokenizer)
    vocab_map = map_vocabularies(old, new)
    inputs = Inputs(old, new, lambda files, side: (document.text for document in read_documents(options.text)))
    # The texts are of both languages already, so each is read once.
    method = {"method": options.arm} | ({"target_only": True} if options.arm == "focus" else {})
    return make_matrix(parse_method(method), vocab_map, 0, inputs), vocab_map.counts()["kept"]


def synthetic_map(shared: int, new: int) -> VocabMap:
    """`shared` pieces that are kept and `new` ones after them."""
    kept = [Entry("kept", id) for id in range(shared)]
    return VocabMap(
        shared, shared + new, "old", "new", (*kept, *(Entry("new", None, (id % shared,)) for id in range(new)))
    )


def as_plan(rows: Iterator[Any], shared: int) -> MatrixPlan:
    """A plan of rows alone."""
    mix = RowMix.from_rows(rows, shared)
    return MatrixPlan(mix, torch.arange(mix.num_new_rows), {})


def table(rows: int, width: int) -> torch.Tensor:
    """Unit vectors with the falling spectrum that trained ones have."""
    torch.manual_seed(1)
    return unit(torch.randn(rows, width) * torch.arange(1, width + 1) ** -0.5)


def write_helper(folder: Path, rows: int) -> None:
    """A model of one layer whose embedding is such a table."""
    import transformers

    size = {"hidden_size": HELPER_WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, tie_word_embeddings=True, **size))
    model.model.embed_tokens.weight.data.copy_(table(rows, HELPER_WIDTH))
    model.save_pretrained(folder)
    assert open_hf(folder).shape(EMBEDDING) == (rows, HELPER_WIDTH)


if __name__ == "__main__":
    main()
