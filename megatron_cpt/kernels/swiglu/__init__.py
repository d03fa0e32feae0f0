"""The gated activation of Llama's MLP."""

from __future__ import annotations

from megatron_cpt.kernels.swiglu.op import packed_swiglu, swiglu

__all__ = ["packed_swiglu", "swiglu"]
