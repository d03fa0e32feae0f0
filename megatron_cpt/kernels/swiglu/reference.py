"""SwiGLU in plain torch. Shape letters: N tokens, F FFN size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """Returns silu(gate) * up; without `up`, of the two halves of `gate`; see `op.swiglu`."""
    result: Tensor = _Swiglu.apply(gate, up)
    return result


class _Swiglu(torch.autograd.Function):
    """Keeps the inputs, where autograd would keep SiLU too; the numbers are those of autograd, bit for bit."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        gate_NF, up_NF = _halves(gate, up)
        return silu(gate_NF) * up_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        gate_NF, up_NF = _halves(gate, up)
        if up is None:
            return torch.cat((_grad_gate(grad_NF, gate_NF, up_NF), grad_NF * silu(gate_NF)), -1), None
        return (
            _grad_gate(grad_NF, gate_NF, up_NF) if ctx.needs_input_grad[0] else None,
            grad_NF * silu(gate_NF) if ctx.needs_input_grad[1] else None,
        )


def _grad_gate(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
    return result


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    gate_NF, up_NF = gate.chunk(2, -1)
    return gate_NF, up_NF
