"""RMS normalisation."""

from __future__ import annotations

from megatron_cpt.kernels.norm.op import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
