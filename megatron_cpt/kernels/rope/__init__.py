"""Rotary position embedding."""

from __future__ import annotations

from megatron_cpt.kernels.rope.op import rope
from megatron_cpt.kernels.rope.table import document_positions, rotary_table

__all__ = ["document_positions", "rope", "rotary_table"]
