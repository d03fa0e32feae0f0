"""SwiGLU on an NVIDIA GPU: launches of the kernels in `triton_kernels`, and their gradient.

Shape letters: N tokens, F FFN size.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from megatron_cpt.kernels.graph import GraphOp
from megatron_cpt.kernels.strides import rows_of
from megatron_cpt.kernels.swiglu import triton_kernels as kernels


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """Returns silu(gate) * up; without `up`, of the two halves of `gate`; see `op.swiglu`."""
    result: Tensor = _SWIGLU(gate, up)
    return result


def launch_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """Returns silu(gate) * up [..., F]."""
    gate_NF, up_NF = _halves(gate, up)
    num_tokens, ffn_size = gate_NF.shape
    out = gate.new_empty(*gate.shape[:-1], ffn_size)
    if out.numel():
        launch = kernels.FORWARD.choose(gate.device.type, ffn_size)
        programs = num_tokens * triton.cdiv(ffn_size, launch.blocks["BLOCK_F"])
        kernels.swiglu_forward[(programs,)](
            gate_NF, up_NF, out, ffn_size, gate_NF.stride(0), up_NF.stride(0), **launch.keywords()
        )
    return out


def launch_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up; where they are halves of one tensor, its gradient and an empty one."""
    gate_NF, up_NF = _halves(gate, up)
    grad_gate = gate.new_empty(gate.shape)
    grad_up = gate.new_empty(gate.shape if up is not None else (0,))
    grad_gate_NF, grad_up_NF = _halves(grad_gate, grad_up if up is not None else None)
    if gate.numel():
        grad_NF = rows_of(grad)
        num_tokens, ffn_size = gate_NF.shape
        launch = kernels.BACKWARD.choose(gate.device.type, ffn_size)
        programs = num_tokens * triton.cdiv(ffn_size, launch.blocks["BLOCK_F"])
        tensors = grad_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF
        kernels.swiglu_backward[(programs,)](
            *tensors, ffn_size, *(tensor.stride(0) for tensor in tensors), **launch.keywords()
        )
    return grad_gate, grad_up


def _fake_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (1 if up is not None else 2))


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape if up is not None else (0,))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _arguments(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return grad, gate, up


def _gradients(ctx: Any, results: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    grad_gate, grad_up = results
    return grad_gate, grad_up if ctx.saved_tensors[1] is not None else None


_SWIGLU = GraphOp(
    "swiglu",
    schema="(Tensor gate, Tensor? up) -> Tensor",
    forward=launch_forward,
    fake=_fake_forward,
    backward_schema="(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    backward=launch_backward,
    backward_fake=_fake_backward,
    save=_save,
    arguments=_arguments,
    gradients=_gradients,
)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns gate and up [N, F] with contiguous rows."""
    if up is not None:
        return rows_of(gate), rows_of(up)
    gate_NF, up_NF = rows_of(gate).chunk(2, 1)
    return gate_NF, up_NF
