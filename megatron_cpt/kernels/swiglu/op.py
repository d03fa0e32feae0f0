"""SwiGLU: the public face of the op. Shape letters: N tokens, F FFN size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_cpt.kernels import dispatch
from megatron_cpt.kernels.swiglu import reference

OP = "swiglu"


def _triton_swiglu(*arguments: Any) -> Any:
    from megatron_cpt.kernels.swiglu import triton_swiglu

    return triton_swiglu.swiglu(*arguments)


dispatch.register(OP, "triton", _triton_swiglu, dispatch.triton_obstacle)
dispatch.register(OP, "torch", reference.swiglu, dispatch.anywhere)


def swiglu(gate_NF: Tensor, up_NF: Tensor, *, implementation: str = "auto") -> Tensor:
    """Multiplies the up projection by the gate's SiLU: gate * sigmoid(gate) * up.

    Nothing is kept for backward but the two inputs. Differentiable in both.
    The torch implementation rounds SiLU to the inputs' dtype before the product, as the two separate steps do;
    the Triton implementation rounds once, at the end.

    Args:
        gate_NF: [..., F], floating; any strides.
        up_NF: shape, dtype and device of the gate.
        implementation: "auto", or the name of one.

    Returns:
        Shape and dtype of the inputs.

    Raises:
        ValueError: shapes or dtypes differ.
        KernelUnsupported: the named implementation cannot run here.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6, without the three projections.
    """
    if gate_NF.shape != up_NF.shape or gate_NF.dtype != up_NF.dtype:
        raise ValueError(
            f"{OP}: got gate {tuple(gate_NF.shape)} in {gate_NF.dtype} and up {tuple(up_NF.shape)} in {up_NF.dtype}; "
            "expected one shape and one dtype"
        )
    return _run(gate_NF, up_NF, implementation)


def packed_swiglu(gate_up_NF2: Tensor, *, implementation: str = "auto") -> Tensor:
    """Returns `swiglu` of a tensor's first and second half, as one matrix product makes them.

    Args:
        gate_up_NF2: [..., 2 F]: the gate's F columns, then the up projection's; floating, any strides.
        implementation: "auto", or the name of one.

    Returns:
        [..., F] in the dtype of the input. The gradient comes as one tensor in the shape of the input.

    Raises:
        ValueError: the last dimension is odd.
        KernelUnsupported: the named implementation cannot run here.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6, without the three projections.
    """
    if gate_up_NF2.dim() < 1 or gate_up_NF2.shape[-1] % 2:
        raise ValueError(f"{OP}: got {tuple(gate_up_NF2.shape)}; expected [..., 2 F], the gate and then up")
    return _run(gate_up_NF2, None, implementation)


def _run(gate: Tensor, up: Tensor | None, implementation: str) -> Tensor:
    function = dispatch.choose(OP, implementation, device=gate.device.type, dtype=gate.dtype)
    result: Tensor = function(gate, up)
    return result
