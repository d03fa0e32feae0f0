"""Output projection and cross-entropy over a sharded vocabulary, as one op."""

from __future__ import annotations

from megatron_cpt.kernels.cross_entropy.op import LinearCrossEntropy, linear_cross_entropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]
