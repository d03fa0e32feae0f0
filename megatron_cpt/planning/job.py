"""The plan of one training job: its layout, sizes, work and memory, before anything is started."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_cpt.config.schema import LearnConfig, LlamaShape, TrainConfig
from megatron_cpt.planning.flops import flops_per_token
from megatron_cpt.planning.layout import check_layout
from megatron_cpt.planning.memory import estimate_memory
from megatron_cpt.planning.parameters import count_parameters


def plan_job(
    job: LearnConfig | TrainConfig, shape: LlamaShape, vocab_size: int, vocab_divisor: int, world_size: int
) -> dict[str, Any]:
    """Plan a training job.

    Args:
        job: steps, batch, layout, precision.
        shape: the architecture.
        vocab_size: true vocabulary size.
        vocab_divisor: the embedding's rows are padded to a multiple of this.
        world_size: number of ranks.

    Returns:
        A JSON-able dict: `layout`, `parameters`, `tokens` (per step and in all), `flops_per_token`
        (causal and non-causal, see planning/flops.py), `memory` (one entry for each pipeline rank).

    Raises:
        ConfigError: the layout is impossible.
    """
    layout = check_layout(shape, vocab_size, vocab_divisor, job.parallel, job.batch, world_size)
    count = count_parameters(shape, vocab_size)
    memory = estimate_memory(shape, layout, job.parallel, job.batch, job.precision, job.kernels)
    return {
        "layout": {
            "name": layout.name,
            "world_size": layout.world_size,
            "tensor": layout.tensor_size,
            "pipeline": layout.pipeline_size,
            "virtual": layout.virtual_size,
            "data": layout.data_size,
            "num_micro_batches": layout.num_micro_batches,
            "layers_per_stage": list(layout.layers_per_stage),
            "pipeline_layout": layout.pipeline_layout,
            "bubble": layout.bubble,
        },
        "vocabulary": {"vocab_size": vocab_size, "padded_vocab_size": layout.padded_vocab_size},
        "parameters": {"total": count.total, **asdict(count)},
        "tokens": count_tokens(job),
        "flops_per_token": {
            "causal": flops_per_token(shape, vocab_size, job.batch.seq_length),
            "non_causal": flops_per_token(shape, vocab_size, job.batch.seq_length, causal=False),
        },
        "memory": [{**asdict(rank), "total_bytes": rank.total_bytes} for rank in memory],
    }


def count_tokens(job: LearnConfig | TrainConfig) -> dict[str, int]:
    """Tokens of a job: `per_step`, `steps`, `total`; padding counts."""
    per_step = job.batch.global_batch_size * job.batch.seq_length
    return {"per_step": per_step, "steps": job.train_steps, "total": per_step * job.train_steps}
