"""Causal attention over packed documents."""

from __future__ import annotations

from megatron_cpt.kernels.attention.op import attention

__all__ = ["attention"]
