"""RMSNorm: the public face of the op. Shape letters: N tokens, D hidden size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.norm import reference

OP = "rms_norm"
ADD_OP = "add_rms_norm"


def _triton_rms_norm(*arguments: Any) -> Any:
    from megatron_cpt.kernels.norm import triton_norm

    return triton_norm.rms_norm(*arguments)


def _triton_add_rms_norm(*arguments: Any) -> Any:
    from megatron_cpt.kernels.norm import triton_norm

    return triton_norm.add_rms_norm(*arguments)


dispatch.register(OP, "triton", _triton_rms_norm, dispatch.triton_obstacle)
dispatch.register(OP, "torch", reference.rms_norm, dispatch.anywhere)
dispatch.register(ADD_OP, "triton", _triton_add_rms_norm, dispatch.triton_obstacle)
dispatch.register(ADD_OP, "torch", reference.add_rms_norm, dispatch.anywhere)


def rms_norm(hidden_ND: Tensor, weight_D: Tensor, epsilon: float, *, implementation: str = "auto") -> Tensor:
    """Scales every token to unit root mean square, then each channel by its weight.

    out = weight * cast(x / sqrt(mean(x^2) + epsilon)): statistics and quotient in fp32 (float64 for float64),
    the cast to the dtype of `hidden_ND` before the weight is applied. Differentiable in both tensors; the
    statistics are kept for backward, not the normalised tokens. Nothing is reduced across ranks: under
    sequence parallelism the caller sums the weight's gradient.

    Args:
        hidden_ND: [..., D], any floating dtype; leading dimensions are tokens.
        weight_D: [D], the dtype of `hidden_ND` or wider.
        epsilon: added to the mean square, > 0.
        implementation: "auto", or the name of one.

    Returns:
        Shape and dtype of `hidden_ND`.

    Raises:
        ValueError: the shapes do not belong together.
        KernelUnsupported: the named implementation cannot run here.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    Deviates: epsilon under the root and the order of cast and weight are Llama's.
    """
    _check(OP, hidden_ND, weight_D)
    function = dispatch.choose(OP, implementation, device=hidden_ND.device.type, dtype=hidden_ND.dtype)
    result: Tensor = function(hidden_ND, weight_D, epsilon)
    return result


def add_rms_norm(
    hidden_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, epsilon: float, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Adds two streams and normalises the sum: `rms_norm(hidden + residual)`, and the sum itself.

    The sum is rounded to the dtype of `hidden_ND` before it is normalised, so both results have the bits of the
    two separate steps. The sum is kept for backward, and neither of the two streams. Differentiable in all tensors.

    Args:
        hidden_ND: [..., D], any floating dtype; leading dimensions are tokens.
        residual_ND: shape, dtype and device of `hidden_ND`.
        weight_D: [D], the dtype of `hidden_ND` or wider.
        epsilon: added to the mean square, > 0.
        implementation: "auto", or the name of one.

    Returns:
        The normalised sum and the sum, both in shape and dtype of `hidden_ND`.

    Raises:
        ValueError: the shapes or dtypes do not belong together.
        KernelUnsupported: the named implementation cannot run here.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    Deviates: epsilon under the root and the order of cast and weight are Llama's.
    """
    _check(ADD_OP, hidden_ND, weight_D)
    if residual_ND.shape != hidden_ND.shape or residual_ND.dtype != hidden_ND.dtype:
        raise ValueError(
            f"{ADD_OP}: got residual {tuple(residual_ND.shape)} in {residual_ND.dtype}; "
            f"expected that of hidden, {tuple(hidden_ND.shape)} in {hidden_ND.dtype}"
        )
    function = dispatch.choose(ADD_OP, implementation, device=hidden_ND.device.type, dtype=hidden_ND.dtype)
    result: tuple[Tensor, Tensor] = function(hidden_ND, residual_ND, weight_D, epsilon)
    return result


def _check(op: str, hidden_ND: Tensor, weight_D: Tensor) -> None:
    if weight_D.dim() != 1 or hidden_ND.dim() < 1 or hidden_ND.shape[-1] != weight_D.shape[0]:
        raise ValueError(
            f"{op}: got hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_D.shape)}; "
            "expected hidden [..., D] and weight [D]"
        )
