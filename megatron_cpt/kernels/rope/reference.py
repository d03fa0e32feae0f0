"""Rotary position embedding in plain torch. Shape letters: as in `op`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope(query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Returns rotated query and key; see `op.rope`."""
    rotated: tuple[Tensor, Tensor] = _Rope.apply(query, key, cos_NR, sin_NR)
    return (query.copy_(rotated[0]), key.copy_(rotated[1])) if in_place else rotated


class _Rope(torch.autograd.Function):
    """Keeps the table alone."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_NR, sin_NR)
        return _rotate(query, cos_NR, sin_NR), _rotate(key, cos_NR, sin_NR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_NR, sin_NR = ctx.saved_tensors
        grad_query, grad_key = (
            _rotate(grad, cos_NR, -sin_NR) if wanted else None
            for grad, wanted in zip(grads, ctx.needs_input_grad[:2], strict=True)
        )
        return grad_query, grad_key, None, None


def _rotate(heads: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    shape = len(cos_NR), *[1] * (heads.dim() - 2), cos_NR.shape[1]
    cos, sin = (table.to(heads.dtype).view(shape) for table in (cos_NR, sin_NR))
    first, second = heads.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
