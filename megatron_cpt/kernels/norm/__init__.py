"""RMS normalisation."""

from __future__ import annotations

from megatron_cpt.kernels.norm.op import rms_norm

__all__ = ["rms_norm"]
