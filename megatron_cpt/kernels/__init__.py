"""The ops that are worth a kernel, each with a plain torch implementation that runs everywhere."""

from __future__ import annotations

from megatron_cpt.kernels.attention import attention
from megatron_cpt.kernels.cross_entropy import (
    LinearCrossEntropy,
    join_statistics,
    linear_cross_entropy,
    linear_cross_entropy_gradient,
    linear_cross_entropy_statistics,
)
from megatron_cpt.kernels.norm import add_rms_norm, rms_norm
from megatron_cpt.kernels.rope import document_positions, rope, rotary_table
from megatron_cpt.kernels.swiglu import packed_swiglu, swiglu

__all__ = [
    "LinearCrossEntropy",
    "add_rms_norm",
    "attention",
    "document_positions",
    "join_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_gradient",
    "linear_cross_entropy_statistics",
    "packed_swiglu",
    "rms_norm",
    "rope",
    "rotary_table",
    "swiglu",
]
