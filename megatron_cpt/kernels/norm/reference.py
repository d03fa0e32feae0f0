"""RMSNorm in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(hidden_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Returns weight * cast(x / rms(x)); see `op.rms_norm`."""
    result: Tensor = _RmsNorm.apply(hidden_ND, weight_D, epsilon)
    return result


def add_rms_norm(hidden_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of the sum, and the sum; see `op.add_rms_norm`."""
    total_ND = hidden_ND + residual_ND
    return rms_norm(total_ND, weight_D, epsilon), total_ND


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number a token, where autograd would keep several fp32 copies of the input."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide_ND = hidden_ND.to(_statistics_dtype(hidden_ND))
        inverse_N1 = torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden_ND, weight_D, inverse_N1)
        normed_ND = (wide_ND * inverse_N1).to(hidden_ND.dtype)
        return (normed_ND * weight_D).to(hidden_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, weight_D, inverse_N1 = ctx.saved_tensors
        wide = inverse_N1.dtype
        grad_ND, normed_ND = grad_ND.to(wide), hidden_ND.to(wide) * inverse_N1
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_ND * normed_ND).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            # With u = weight * grad: d(x / rms)/dx applied to u takes away the part of u along x.
            grad_ND = grad_ND * weight_D
            along_N1 = (grad_ND * normed_ND).mean(-1, keepdim=True)
            grad_hidden = ((grad_ND - normed_ND * along_N1) * inverse_N1).to(hidden_ND.dtype)
        return grad_hidden, grad_weight, None


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
