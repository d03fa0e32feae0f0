"""The job of test_megatron.py: `python -m tests.checkpoint.layouts_job FOLDER`.

FOLDER/cases.json is a list of cases, each a converted folder and a layout:

    {"folder", "kind": "torch_dist" or "mp_rank", "shape", "padded_vocab_size", "layout": [TP, PP, VPP or null],
     "tokens": file of the token ids, or null, "output": file}

With tokens the layout runs in real processes that talk over gloo, and `output` gets the logits. Without, each rank
of it is pretended in this process, and `output` gets the weights that megatron-core loaded there, rank by rank.
FOLDER/whole, if there, is what megatron_job.py does then.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.runtime.engine import install_engine
from tests.checkpoint.megatron_slices import Layout

Case = dict[str, Any]


def by_layout(cases: list[Case]) -> dict[Layout, list[Case]]:
    found: dict[Layout, list[Case]] = defaultdict(list)
    for case in cases:
        found[Layout(*case["layout"])].append(case)
    return found


def pretend(layout: Layout, cases: list[Case]) -> None:
    from tests.checkpoint import megatron_rank

    loaded: list[list[Any]] = [[] for _ in cases]
    for rank in range(layout.world_size):
        with megatron_rank.pretended_rank(layout, rank):
            for case, ranks in zip(cases, loaded, strict=True):
                chunks = megatron_rank.build(LlamaShape(**case["shape"]), case["padded_vocab_size"], layout)
                megatron_rank.load(chunks, Path(case["folder"]), case["kind"])
                ranks.append(megatron_rank.weights(chunks))
    for case, ranks in zip(cases, loaded, strict=True):
        torch.save(ranks, case["output"])


def run_rank(rank: int, world_size: int, rendezvous: str, cases: list[Case]) -> None:
    from tests.checkpoint import megatron_rank

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    for layout, of_layout in by_layout(cases).items():
        with megatron_rank.parallel(layout):
            for case in of_layout:
                tokens = torch.load(case["tokens"])
                shape = LlamaShape(**case["shape"])
                chunks = megatron_rank.build(shape, case["padded_vocab_size"], layout, tokens.shape[1])
                megatron_rank.load(chunks, Path(case["folder"]), case["kind"])
                logits = megatron_rank.logits(chunks, layout, tokens)
                if logits is not None and layout.coordinates(rank)[0] == 0:
                    torch.save(logits, case["output"])
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # the engine's own, about its own defaults
    install_engine("cpu")
    from tests.checkpoint import megatron_job, megatron_rank  # noqa: F401 - before the fork, so that it is imported once

    cases: list[Case] = json.loads((folder / "cases.json").read_text())
    by_size: dict[int, list[Case]] = defaultdict(list)
    for case in cases:
        if case["tokens"]:
            by_size[Layout(*case["layout"]).world_size].append(case)
    method = "fork" if sys.platform == "linux" else "spawn"  # elsewhere a fork is not safe
    for size, of_size in by_size.items():
        arguments = (size, f"file://{folder}/rendezvous-{size}", of_size)
        torch.multiprocessing.start_processes(run_rank, arguments, nprocs=size, start_method=method)
    torch.set_num_threads(1)
    for layout, of_layout in by_layout([case for case in cases if not case["tokens"]]).items():
        pretend(layout, of_layout)
    if (folder / "whole").exists():
        megatron_job.main(folder / "whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
