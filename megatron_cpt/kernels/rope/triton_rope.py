"""Rotary position embedding on an NVIDIA GPU: the launch of the kernel in `triton_kernels`, and its gradient.

Shape letters: as in `op`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_cpt.kernels.graph import GraphOp
from megatron_cpt.kernels.rope import triton_kernels as kernels


def rope(query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Returns rotated query and key; see `op.rope`."""
    rotated: tuple[Tensor, Tensor]
    if in_place and not torch.compiler.is_compiling():
        rotated = _RopeInPlace.apply(query, key, cos_NR, sin_NR)
        return rotated
    rotated = _ROPE(query, key, cos_NR, sin_NR, False)
    # A compiler decides by itself what is done in place.
    return (query.copy_(rotated[0]), key.copy_(rotated[1])) if in_place else rotated


def launch_rotation(query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Returns the rotated query and key, or with `inverse` those rotated back, contiguous."""
    query_out, key_out = query.new_empty(query.shape), key.new_empty(key.shape)
    _launch(query, key, query_out, key_out, cos_NR, sin_NR, inverse)
    return query_out, key_out


def launch_in_place(query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> None:
    """Rotates query and key where they lie."""
    if query.stride(-1) == key.stride(-1) == 1:
        _launch(query, key, query, key, cos_NR, sin_NR, False)
    else:
        for tensor, rotated in zip((query, key), launch_rotation(query, key, cos_NR, sin_NR, False), strict=True):
            tensor.copy_(rotated)


def _launch(
    query: Tensor, key: Tensor, query_out: Tensor, key_out: Tensor, cos_NR: Tensor, sin_NR: Tensor, inverse: bool
) -> None:
    query, key, query_out, key_out = (_grouped(tensor) for tensor in (query, key, query_out, key_out))
    (num_tokens, *query_heads, head_size), key_heads = query.shape, key.shape[1:3]
    num_query_heads, num_key_heads = math.prod(query_heads), math.prod(key_heads)
    settings = kernels.ROTATION.choose(query.device.type, (max(num_query_heads, num_key_heads), head_size))
    blocks = sum(triton.cdiv(heads, settings.blocks["BLOCK_H"]) for heads in (num_query_heads, num_key_heads))
    if not num_tokens * blocks:
        return
    kernels.rotate[(num_tokens, blocks)](
        query,
        key,
        query_out,
        key_out,
        cos_NR.contiguous(),
        sin_NR.contiguous(),
        num_query_heads,
        num_key_heads,
        query.shape[2],
        key.shape[2],
        head_size // 2,
        *query.stride()[:3],
        *query_out.stride()[:3],
        *key.stride()[:3],
        *key_out.stride()[:3],
        INVERSE=inverse,
        **settings.keywords(),
    )


def _grouped(heads: Tensor) -> Tensor:
    """Returns [N, groups, heads of a group, K] with contiguous heads."""
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    return heads if heads.dim() == 4 else heads.unsqueeze(1)


def _fake(query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the table alone."""
    _, _, cos_NR, sin_NR, ctx.inverse = inputs
    ctx.save_for_backward(cos_NR, sin_NR)


def _arguments(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
    cos_NR, sin_NR = ctx.saved_tensors
    return grad_query, grad_key, cos_NR, sin_NR, not ctx.inverse


def _gradients(ctx: Any, results: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return (*results, None, None, None)


_SCHEMA = "(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)"
_ROPE = GraphOp(
    "rope",
    schema=_SCHEMA,
    forward=launch_rotation,
    fake=_fake,
    backward_schema=_SCHEMA,
    backward=launch_rotation,
    backward_fake=_fake,
    save=_save,
    arguments=_arguments,
    gradients=_gradients,
)


class _RopeInPlace(torch.autograd.Function):
    """Rotates its inputs where they lie; keeps the table alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_NR, sin_NR)
        ctx.mark_dirty(query, key)
        launch_in_place(query, key, cos_NR, sin_NR)
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos_NR, sin_NR = ctx.saved_tensors
        return (*launch_rotation(grad_query, grad_key, cos_NR, sin_NR, True), None, None)
