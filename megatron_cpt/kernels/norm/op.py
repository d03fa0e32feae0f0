"""RMSNorm: the public face of the op. Shape letters: N tokens, D hidden size."""

from __future__ import annotations

from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.norm import reference

OP = "rms_norm"

dispatch.register(OP, "torch", reference.rms_norm, dispatch.anywhere)


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
    if weight_D.dim() != 1 or hidden_ND.dim() < 1 or hidden_ND.shape[-1] != weight_D.shape[0]:
        raise ValueError(
            f"{OP}: got hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_D.shape)}; "
            "expected hidden [..., D] and weight [D]"
        )
    function = dispatch.choose(OP, implementation, device=hidden_ND.device.type, dtype=hidden_ND.dtype)
    result: Tensor = function(hidden_ND, weight_D, epsilon)
    return result
