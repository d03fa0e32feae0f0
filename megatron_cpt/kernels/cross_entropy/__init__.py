"""Output projection and cross-entropy in one op."""

from __future__ import annotations

from megatron_cpt.kernels.cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
