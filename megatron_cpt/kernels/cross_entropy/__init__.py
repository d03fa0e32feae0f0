"""Output projection and cross-entropy over a sharded vocabulary, as one op."""

from __future__ import annotations

from megatron_cpt.kernels.cross_entropy.exchange import join_statistics
from megatron_cpt.kernels.cross_entropy.op import LinearCrossEntropy, linear_cross_entropy
from megatron_cpt.kernels.cross_entropy.shards import linear_cross_entropy_gradient, linear_cross_entropy_statistics

__all__ = [
    "LinearCrossEntropy",
    "join_statistics",
    "linear_cross_entropy",
    "linear_cross_entropy_gradient",
    "linear_cross_entropy_statistics",
]
