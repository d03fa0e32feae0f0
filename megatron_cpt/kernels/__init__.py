"""The ops that are worth a kernel, each with a plain torch implementation that runs everywhere."""

from __future__ import annotations

from megatron_cpt.kernels.attention import attention
from megatron_cpt.kernels.cross_entropy import linear_cross_entropy
from megatron_cpt.kernels.norm import add_rms_norm, rms_norm
from megatron_cpt.kernels.rope import document_positions, rope, rotary_table
from megatron_cpt.kernels.swiglu import packed_swiglu, swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "document_positions",
    "linear_cross_entropy",
    "packed_swiglu",
    "rms_norm",
    "rope",
    "rotary_table",
    "swiglu",
]
