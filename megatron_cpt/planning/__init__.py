"""What a job costs and whether it fits: pure arithmetic, no torch.

Letters as in docs/conventions.md: D hidden, H heads, G groups, K head size, F FFN, V vocabulary,
P padded vocabulary, S sequence, B micro-batch, N = B * S.
"""

from megatron_cpt.planning.flops import attention_flops_per_token, flops_per_token
from megatron_cpt.planning.job import count_tokens, plan_job
from megatron_cpt.planning.layout import Layout, check_layout, pipeline_layout_string, split_layers
from megatron_cpt.planning.memory import RankMemory, estimate_memory
from megatron_cpt.planning.parameters import (
    ParameterCount,
    count_parameters,
    rank_parameters,
)
from megatron_cpt.planning.vocabulary import tensor_parallel_fit, vocabulary_costs

__all__ = [
    "Layout",
    "ParameterCount",
    "RankMemory",
    "attention_flops_per_token",
    "check_layout",
    "count_parameters",
    "count_tokens",
    "estimate_memory",
    "flops_per_token",
    "pipeline_layout_string",
    "plan_job",
    "rank_parameters",
    "split_layers",
    "tensor_parallel_fit",
    "vocabulary_costs",
]
