"""How wrong are loss and gradients of the output projection when its logits are stored in 16 bits, or in 32?

Per seed: bf16 hidden states and weights with logits of standard deviation 3, in which each token's label stands out;
the op with its torch row functions and each `logits_dtype`; and the same with float64 for everything, from the same
bf16 numbers. Errors are norms of differences relative to the norm of the truth. The gradients are compared twice: as
the op returns them, rounded to bf16, and `unrounded`, as products with the logits' gradient (which is bf16 in both)
come out of fp32 accumulators and reach a `main_grad`. `rare` is the mean over the rows of the weight's gradient that
are the label of one token, each row relative to itself: a norm over all rows would hide them. Nothing here depends on
the machine but the last bits.

    python benchmarks/bench_cross_entropy_error.py --output results/cross_entropy_error_2cpu_202611.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.kernels import linear_cross_entropy
from megatron_cpt.kernels.cross_entropy import torch_rows
from megatron_cpt.kernels.cross_entropy.products import write_logits

RESULTS = ("loss", "log_sum_exp", "hidden", "weight", "weight_rare", "hidden_unrounded", "weight_unrounded")
COLUMNS = ("seed", "logits_dtype", "chunks", *RESULTS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def inputs(seed: int, tokens: int, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, D] and weights [V, D] in bf16, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * (3 / hidden_size**0.5)
    hidden = torch.randn(tokens, hidden_size, generator=generator) + 1.5 * weight[labels]
    return hidden.bfloat16(), weight.bfloat16(), labels


def run(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> tuple[Tensor, ...]:
    """Loss of each token, log-sum-exp, and both gradients of the mean."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = linear_cross_entropy(hidden, weight, labels, vocab_size=len(weight), reduction="mean", **options)
    result.loss.backward()
    return result.nats_N, result.log_sum_exp_N, hidden.grad, weight.grad


def unrounded(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both gradients of the mean, of bf16 gradients of logits that were stored in `dtype`."""
    logits = torch.empty(len(hidden), len(weight), dtype=dtype)
    write_logits(hidden, weight, logits)
    found = torch.empty(3, len(hidden))
    torch_rows.statistics(logits, labels, found, 0.0)
    lse, grad = found[1].log() + found[0], torch.full((len(hidden),), 1 / len(hidden))
    options = {"vocab_size": len(weight), "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    grad_logits = torch.empty(logits.shape, dtype=torch.bfloat16)
    torch_rows.gradient(logits, grad_logits, labels, lse, grad, **options)
    return grad_logits.float() @ weight.float(), grad_logits.float().T @ hidden.float()


def measure(seed: int, tokens: int, hidden_size: int, vocab_size: int) -> list[dict[str, object]]:
    """One row for each dtype and number of chunks: all logits at once, and a quarter of the tokens at a time."""
    hidden, weight, labels = inputs(seed, tokens, hidden_size, vocab_size)
    truth = run(hidden.double(), weight.double(), labels, implementation="reference")
    once = torch.bincount(labels, minlength=vocab_size) == 1
    rows = []
    for name, dtype in DTYPES.items():
        wide = unrounded(hidden, weight, labels, dtype)
        for chunks in (1, 4):
            budget_bytes = tokens // chunks * vocab_size * dtype.itemsize
            found = run(hidden, weight, labels, logits_dtype=dtype, budget_bytes=budget_bytes, implementation="torch")
            errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
            rare = (found[3].double() - truth[3])[once].norm(dim=1) / truth[3][once].norm(dim=1)
            wide_errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(wide, truth[2:], strict=True)]
            values = (f"{error:.3e}" for error in (*errors, rare.mean().item(), *wide_errors))
            rows.append(dict(zip(COLUMNS, (seed, name, chunks, *values), strict=True)))
    return rows


def summary(rows: list[dict[str, object]]) -> str:
    """Medians over the seeds, and in brackets relative to that with bf16 logits and as many chunks."""

    def median(name: str, chunks: int, column: str) -> float:
        chosen = [row for row in rows if row["logits_dtype"] == name and row["chunks"] == chunks]
        return statistics.median(float(str(row[column])) for row in chosen)

    lines = ["| logits | chunks | " + " | ".join(RESULTS) + " |", "|---" * (2 + len(RESULTS)) + "|"]
    for name in DTYPES:
        for chunks in (1, 4):
            pairs = [(median(name, chunks, column), median("bf16", chunks, column)) for column in RESULTS]
            values = [f"{error:.1e}" + (f" ({error / of:.2f})" if name != "bf16" else "") for error, of in pairs]
            lines.append(f"| {name} | {chunks} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the table and print its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sizes = arguments.tokens, arguments.hidden_size, arguments.vocab_size
    rows = [row for seed in range(arguments.seeds) for row in measure(seed, *sizes)]
    if arguments.output is not None:
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(summary(rows))


if __name__ == "__main__":
    main()
