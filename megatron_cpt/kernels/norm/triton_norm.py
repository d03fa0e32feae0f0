"""RMSNorm on an NVIDIA GPU: launches of the kernels in `triton_kernels`, and their gradient.

Shape letters: N tokens, D hidden size, P programs of a backward kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_cpt.kernels.graph import GraphOp
from megatron_cpt.kernels.norm import triton_kernels as kernels
from megatron_cpt.kernels.strides import rows_of
from megatron_cpt.kernels.tuning import Launch
from megatron_cpt.runtime.device import multiprocessor_count

_INTERPRETED_PROGRAMS = 3  # enough that partial sums are really added


def rms_norm(hidden: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Returns weight * cast(x / rms(x)); see `op.rms_norm`."""
    normed: Tensor = _RMS_NORM(hidden, None, weight_D, epsilon)[0]
    return normed


def add_rms_norm(hidden: Tensor, residual: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of the sum, and the sum; see `op.add_rms_norm`."""
    normed, total, _ = _RMS_NORM(hidden, residual, weight_D, epsilon)
    return normed, total


def launch_forward(
    hidden: Tensor, residual: Tensor | None, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns normed [..., D], the sum [..., D] (empty without a residual) and 1 / rms [N] in fp32."""
    hidden_ND = rows_of(hidden)
    residual_ND = hidden_ND if residual is None else rows_of(residual)
    num_tokens, hidden_size = hidden_ND.shape
    normed = hidden.new_empty(hidden.shape)
    total = hidden.new_empty(hidden.shape if residual is not None else (0,))
    inverse_N = hidden.new_empty(num_tokens, dtype=torch.float32)
    if hidden.numel():
        launch = kernels.FORWARD.choose(hidden.device.type, hidden_size)
        kernels.rms_norm_forward[(triton.cdiv(num_tokens, launch.blocks["BLOCK_N"]),)](
            hidden_ND,
            residual_ND,
            weight_D.contiguous(),
            normed,
            total,
            inverse_N,
            num_tokens,
            hidden_size,
            hidden_ND.stride(0),
            residual_ND.stride(0),
            epsilon,
            HAS_RESIDUAL=residual is not None,
            ONE_BLOCK=hidden_size <= launch.blocks["BLOCK_D"],
            **launch.keywords(),
        )
    return normed, total, inverse_N


def launch_backward(
    grad: Tensor, grad_total: Tensor | None, hidden: Tensor, weight_D: Tensor, inverse_N: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the tokens [..., D] and of the weight [D], the latter empty where not wanted."""
    grad_hidden = hidden.new_empty(hidden.shape)
    if not hidden.numel():
        return grad_hidden, weight_D.new_zeros(weight_D.shape if with_weight else (0,))
    rows = rows_of(grad), None if grad_total is None else rows_of(grad_total), rows_of(hidden)
    run = _fused_backward if hidden.shape[-1] <= kernels.FUSED_SIZE else _wide_backward
    partial_PD = run(*rows, weight_D.contiguous(), inverse_N, grad_hidden, with_weight)
    # torch adds along a dimension in an order that depends on the shape alone.
    return grad_hidden, weight_D.new_empty(0) if partial_PD is None else partial_PD.sum(0).to(weight_D.dtype)


def _fused_backward(
    grad_ND: Tensor,
    grad_total_ND: Tensor | None,
    hidden_ND: Tensor,
    weight_D: Tensor,
    inverse_N: Tensor,
    grad_hidden: Tensor,
    with_weight: bool,
) -> Tensor | None:
    num_tokens, hidden_size = hidden_ND.shape
    other_ND = grad_ND if grad_total_ND is None else grad_total_ND
    launch = kernels.BACKWARD.choose(hidden_ND.device.type, hidden_size)
    programs = _programs(hidden_ND, launch)
    partial_PD = hidden_ND.new_empty(programs if with_weight else 0, hidden_size, dtype=torch.float32)
    kernels.rms_norm_backward[(programs,)](
        grad_ND,
        other_ND,
        hidden_ND,
        weight_D,
        inverse_N,
        grad_hidden,
        partial_PD,
        num_tokens,
        hidden_size,
        grad_ND.stride(0),
        other_ND.stride(0),
        hidden_ND.stride(0),
        HAS_GRAD_SUM=grad_total_ND is not None,
        WITH_WEIGHT=with_weight,
        NUM_STAGES=launch.num_stages,
        **launch.keywords(),
    )
    return partial_PD if with_weight else None


def _wide_backward(
    grad_ND: Tensor,
    grad_total_ND: Tensor | None,
    hidden_ND: Tensor,
    weight_D: Tensor,
    inverse_N: Tensor,
    grad_hidden: Tensor,
    with_weight: bool,
) -> Tensor | None:
    num_tokens, hidden_size = hidden_ND.shape
    other_ND = grad_ND if grad_total_ND is None else grad_total_ND
    launch = kernels.WIDE_BACKWARD.choose(hidden_ND.device.type, hidden_size)
    kernels.rms_norm_wide_backward[(num_tokens,)](
        grad_ND,
        other_ND,
        hidden_ND,
        weight_D,
        inverse_N,
        grad_hidden,
        hidden_size,
        grad_ND.stride(0),
        other_ND.stride(0),
        hidden_ND.stride(0),
        HAS_GRAD_SUM=grad_total_ND is not None,
        **launch.keywords(),
    )
    if not with_weight:
        return None
    launch = kernels.WIDE_WEIGHT.choose(hidden_ND.device.type, hidden_size)
    columns = triton.cdiv(hidden_size, launch.blocks["BLOCK_D"])
    programs = triton.cdiv(_programs(hidden_ND, launch), columns)
    partial_PD = hidden_ND.new_empty(programs, hidden_size, dtype=torch.float32)
    kernels.rms_norm_wide_weight[(programs, columns)](
        grad_ND,
        hidden_ND,
        inverse_N,
        partial_PD,
        num_tokens,
        hidden_size,
        grad_ND.stride(0),
        hidden_ND.stride(0),
        NUM_STAGES=launch.num_stages,
        **launch.keywords(),
    )
    return partial_PD


def _fake_forward(
    hidden: Tensor, residual: Tensor | None, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty(hidden.shape if residual is not None else (0,))
    return hidden.new_empty(hidden.shape), total, hidden.new_empty(_num_tokens(hidden), dtype=torch.float32)


def _fake_backward(
    grad: Tensor, grad_total: Tensor | None, hidden: Tensor, weight_D: Tensor, inverse_N: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight_D.new_empty(weight_D.shape if with_weight else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps the normalised input (the sum where there is a residual) and one number a token."""
    hidden, residual, weight_D, _ = inputs
    _, total, inverse_N = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(hidden if residual is None else total, weight_D, inverse_N)


def _arguments(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    hidden, weight_D, inverse_N = ctx.saved_tensors
    grad = torch.zeros_like(hidden) if grad is None else grad
    return grad, grad_total if ctx.has_residual else None, hidden, weight_D, inverse_N, ctx.needs_input_grad[2]


def _gradients(ctx: Any, results: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight_D = results
    grad_residual = grad_hidden if ctx.has_residual else None
    return grad_hidden, grad_residual, grad_weight_D if ctx.needs_input_grad[2] else None, None


_RMS_NORM = GraphOp(
    "rms_norm",
    schema="(Tensor hidden, Tensor? residual, Tensor weight, float epsilon) -> (Tensor, Tensor, Tensor)",
    forward=launch_forward,
    fake=_fake_forward,
    backward_schema="(Tensor grad, Tensor? grad_total, Tensor hidden, Tensor weight, Tensor inverse, bool with_weight)"
    " -> (Tensor, Tensor)",
    backward=launch_backward,
    backward_fake=_fake_backward,
    save=_save,
    arguments=_arguments,
    gradients=_gradients,
)


def _num_tokens(hidden: Tensor) -> int:
    return math.prod(hidden.shape[:-1])


def _programs(hidden_ND: Tensor, launch: Launch) -> int:
    multiprocessors = multiprocessor_count(hidden_ND.device.type)
    most = _INTERPRETED_PROGRAMS if multiprocessors is None else launch.programs * multiprocessors
    return min(triton.cdiv(hidden_ND.shape[0], launch.blocks["BLOCK_N"]), most)
