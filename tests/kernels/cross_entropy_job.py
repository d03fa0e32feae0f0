"""The job of test_cross_entropy_parallel.py: WORLD_SIZE FOLDER.

Every rank reads FOLDER/cases.pt, runs each case over the group of its size and writes FOLDER/rank<RANK>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from megatron_cpt.kernels.cross_entropy import (
    join_statistics,
    linear_cross_entropy,
    linear_cross_entropy_gradient,
    linear_cross_entropy_statistics,
)

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def run_case(case: dict[str, Any], rank: int, group: dist.ProcessGroup, sent: list[tuple[str, int]]) -> dict[str, Any]:
    """Computes the rank's part of one case: results, both gradients, and the numbers sent between the ranks."""
    starts = [sum(case["rows"][:i]) for i in range(len(case["rows"]))]
    rows = slice(starts[rank], starts[rank] + case["rows"][rank])
    hidden, options = case["hidden"], dict(case["options"])
    if options.get("sequence_parallel"):
        hidden = hidden.chunk(len(case["rows"]))[rank].clone()
    hidden, weight = hidden.requires_grad_(), case["weight"][rows].clone().requires_grad_()
    sent.clear()
    result = linear_cross_entropy(
        hidden,
        weight,
        case["labels"],
        vocab_start=rows.start,
        vocab_size=case["vocab_size"],
        group=group,
        budget_bytes=case["budget_bytes"],
        **options,
    )
    forward = list(sent)
    sent.clear()
    grad = case["grad"] if options.get("reduction", "none") == "none" else torch.tensor(0.7)
    grads = torch.autograd.grad(result.loss, (hidden, weight), grad)
    return {
        **{"loss": result.loss.detach(), "correct": result.correct_N, "lse": result.log_sum_exp_N},
        **{"hidden": grads[0], "weight": grads[1], "forward": forward, "backward": list(sent)},
    }


def run_halves(case: dict[str, Any]) -> dict[str, Any]:
    """The same of all shards in turn and by the two public halves; no rank talks to another."""
    starts = [sum(case["rows"][:i]) for i in range(len(case["rows"]))]
    shards = [(start, case["weight"][start : start + rows]) for start, rows in zip(starts, case["rows"], strict=True)]
    options = {"vocab_size": case["vocab_size"], "budget_bytes": case["budget_bytes"]}
    statistics = [
        linear_cross_entropy_statistics(case["hidden"], weight, case["labels"], vocab_start=start, **options)
        for start, weight in shards
    ]
    greatest, total, target = join_statistics(torch.stack(statistics))
    lse = greatest + total.log()
    scored = case["labels"] != -100
    grad = case["grad"] * scored
    grads = [
        linear_cross_entropy_gradient(case["hidden"], weight, case["labels"], lse, grad, vocab_start=start, **options)
        for start, weight in shards
    ]
    hidden, weight = zip(*grads, strict=True)
    return {"loss": (lse - target) * scored, "hidden": sum(hidden), "weight": torch.cat(weight)}


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    sent: list[tuple[str, int]] = []

    def counted(name: str) -> Any:
        collective = getattr(dist, name)

        def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            given = arguments[0] if name != "all_reduce" else tensor
            sent.append((name, given.numel()))
            return collective(tensor, *arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    groups = {size: dist.new_subgroups(size)[0] for size in (1, 2, 4)}
    cases = torch.load(folder / "cases.pt")
    results = {}
    for name, case in cases.items():
        group = groups[len(case["rows"])]
        results[name] = run_case(case, dist.get_rank(group), group, sent)
        if rank == 0 and not case["options"]:
            results[name]["halves"] = run_halves(case)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    # A fork of this fresh process spares each rank the import of torch.
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(run_rank, (size, Path(sys.argv[2])), nprocs=size, start_method=method)
