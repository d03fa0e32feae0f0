"""Torch's own fused kernels by name: cuDNN's attention and FlashAttention, where torch has them for a call.

They are given what the implementation "torch" gives torch when all documents have one length: one batch, causal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_cpt.kernels.attention import reference
from megatron_cpt.kernels.attention.documents import Boundaries, lengths_differ, read_boundaries
from megatron_cpt.runtime.device import compute_capability

# By torch's own choice cuDNN comes first from this capability on, and FlashAttention before.
_CUDNN_CAPABILITY = (9, 0)


def _attention(backend: SDPBackend, *arguments: Any) -> Tensor:
    with sdpa_kernel(backend):
        return reference.attention(*arguments)


cudnn = partial(_attention, SDPBackend.CUDNN_ATTENTION)
flash = partial(_attention, SDPBackend.FLASH_ATTENTION)


def cudnn_obstacle(**facts: Any) -> str | None:
    """Returns why cuDNN cannot serve a call, or None."""
    capability = compute_capability(str(facts.get("device")))
    if capability is not None and capability < _CUDNN_CAPABILITY:
        return f"it serves from compute capability 9.0 on, and this GPU has {capability[0]}.{capability[1]}"
    return _obstacle(torch.backends.cuda.can_use_cudnn_attention, **facts)


def flash_obstacle(**facts: Any) -> str | None:
    """Returns why FlashAttention cannot serve a call, or None."""
    return _obstacle(torch.backends.cuda.can_use_flash_attention, **facts)


def _obstacle(
    can_use: Callable[[Any, bool], bool],
    device: object = None,
    dtype: object = None,
    window: int | None = None,
    one_length: bool | None = None,
    cu_seqlens: Boundaries | None = None,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
    **_facts: object,
) -> str | None:
    if device is not None and compute_capability(str(device)) is None:
        return f"it needs an NVIDIA GPU, not {device}"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {dtype}"
    if window is not None:
        return "it has no sliding window"
    if cu_seqlens is not None and tensors is not None:
        one_length = not lengths_differ(read_boundaries(cu_seqlens, tensors[0].shape[0]))
    if one_length is False:
        return "it takes documents of one length, and those of a packed batch differ"
    return None if tensors is None else _refusal(can_use, *tensors)


def _refusal(can_use: Callable[[Any, bool], bool], *tensors: Tensor) -> str | None:
    """Returns why torch itself would not take its kernel for these query, key and value, or None."""
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors)
    grouped = query.shape[1] != key.shape[1]
    call = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, grouped)
    if can_use(call, False):
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        can_use(call, True)
    return f"torch refuses the call: {' '.join(str(warning.message) for warning in said) or 'it does not say why'}"
