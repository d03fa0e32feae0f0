"""The job of test_linear_cross_entropy_parallel.py: WORLD_SIZE FOLDER.

Every rank reads FOLDER/cases.pt, runs each case over the group of its size and writes FOLDER/rank<RANK>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.kernels import linear_cross_entropy


def run_case(case: dict[str, Any], rank: int, group: dist.ProcessGroup, sent: list[int]) -> dict[str, Any]:
    """Computes the rank's part of one case: loss, both gradients, and the numbers sent between the ranks."""
    starts = [sum(case["rows"][:i]) for i in range(len(case["rows"]))]
    rows = slice(starts[rank], starts[rank] + case["rows"][rank])
    hidden = case["hidden"].requires_grad_()
    weight = case["weight"][rows].clone().requires_grad_()
    sent.clear()
    loss = linear_cross_entropy(
        hidden,
        weight,
        case["labels"],
        vocab_start=rows.start,
        vocab_size=case["vocab_size"],
        group=group,
        budget_bytes=case["budget_bytes"],
    )
    grads = torch.autograd.grad(loss, (hidden, weight), case["grad"])
    return {"loss": loss.detach(), "hidden": grads[0], "weight": grads[1], "sent": list(sent)}


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counting_all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting_all_reduce
    groups = {size: dist.new_subgroups(size)[0] for size in (1, 2, 4)}
    cases = torch.load(folder / "cases.pt")
    results = {}
    for name, case in cases.items():
        group = groups[len(case["rows"])]
        results[name] = run_case(case, dist.get_rank(group), group, sent)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    # A fork of this fresh process spares each rank the import of torch.
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(run_rank, (size, Path(sys.argv[2])), nprocs=size, start_method=method)
