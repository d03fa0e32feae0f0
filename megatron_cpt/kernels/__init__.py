"""The ops that are worth a kernel, each with a plain torch implementation that runs everywhere."""

from __future__ import annotations

from megatron_cpt.kernels.attention import attention
from megatron_cpt.kernels.cross_entropy import linear_cross_entropy
from megatron_cpt.kernels.norm import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "attention", "linear_cross_entropy", "rms_norm"]
