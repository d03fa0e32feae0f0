"""A part of the job of test_megatron.py: megatron-core itself loads and saves the checkpoints of FOLDER/cases.json.

For each case it loads `torch_dist`, notes the logits, changes the weights, saves them with megatron-core
in the layouts that the case names, and notes the new logits.
"""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any


def run_case(folder: Path, case: dict[str, Any]) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from megatron_cpt.checkpoint import write_checkpoint_manifest
    from megatron_cpt.config.schema import LlamaShape
    from tests.checkpoint.megatron_rank import build
    from tests.checkpoint.megatron_slices import Layout

    (model,) = build(LlamaShape(**case["shape"]), case["padded_vocab_size"], Layout())
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "torch_dist"))
    model.load_state_dict(loaded["model"], strict=True)
    tokens = torch.load(folder / "tokens.pt")
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    position = torch.arange(length).expand_as(tokens)
    with torch.no_grad():
        torch.save(model(tokens, position, mask), folder / "loaded_logits.pt")
        for name, weight in sorted(model.named_parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
        torch.save(model(tokens, position, mask), folder / "saved_logits.pt")
    layouts: dict[str, dict[str, bool] | None] = {
        "stacked": None,
        "single_layers": {"non_homogeneous_layers": True},
        "gate_apart": {"singleton_local_shards": True},
    }
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(4))
    for layout in case["layouts"]:
        saved = folder / layout
        saved.mkdir()
        state = {
            "model": model.sharded_state_dict(metadata=layouts[layout]),
            "optimizer": {"moment": moment},
            "rng": ShardedObject("rng_state", {"seed": 1}, (1,), (0,)),
            "step": 7,
        }
        dist_checkpointing.save(state, str(saved))
        write_checkpoint_manifest(
            saved, LlamaShape(**case["shape"]), case["vocab_size"], case["padded_vocab_size"], None, {}, step=7
        )


def main(folder: Path) -> None:
    """Run all cases in this process, in which `install_engine` was called."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from tests.checkpoint.megatron_rank import parallel
    from tests.checkpoint.megatron_slices import Layout

    filesystem_async._results_queue = queue.SimpleQueue()  # else a server process
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    with parallel(Layout()):
        for name, case in json.loads((folder / "cases.json").read_text()).items():
            run_case(folder / name, case)
    dist.destroy_process_group()
