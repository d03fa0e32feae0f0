"""Kernels of SwiGLU: a program takes a block of columns of one token.

Shape letters: N tokens, F FFN size.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from megatron_cpt.kernels.tuning import CompileCase, Launch, Table


def _forward_rule(ffn_size: int) -> Launch:
    """A thread loads 16 elements of each input: twice 16 bytes in bf16."""
    block = min(triton.next_power_of_2(ffn_size), 2048)
    return Launch(num_warps=max(block // 512, 1), blocks={"BLOCK_F": block})


def _backward_rule(ffn_size: int) -> Launch:
    """A thread loads 8 elements of each of three inputs, as it also keeps two results."""
    block = min(triton.next_power_of_2(ffn_size), 2048)
    return Launch(num_warps=max(block // 256, 1), blocks={"BLOCK_F": block})


FORWARD = Table(_forward_rule)
BACKWARD = Table(_backward_rule)


@triton.jit
def swiglu_forward(gate_ptr, up_ptr, out_ptr, ffn_size, gate_stride, up_stride, BLOCK_F: tl.constexpr):
    """Writes gate * sigmoid(gate) * up."""
    blocks = tl.cdiv(ffn_size, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < ffn_size
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * ffn_size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    ffn_size,
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    BLOCK_F: tl.constexpr,
):
    """Writes the gradients of gate and up."""
    blocks = tl.cdiv(ffn_size, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < ffn_size
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    dtype = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * grad_gate_stride + columns, grad_gate.to(dtype), mask=mask)
    tl.store(grad_up_ptr + row * grad_up_stride + columns, grad_up.to(dtype), mask=mask)


def compile_cases() -> Iterator[CompileCase]:
    """Yields every kernel with every setting, at the sizes of Llama models and of their shards."""
    tensor, size = "*bf16:16", "i32:16"
    names = ("grad", "gate", "up", "grad_gate", "grad_up")
    signature = {"ffn_size": size, "out_ptr": tensor}
    signature |= {f"{name}_ptr": tensor for name in names} | {f"{name}_stride": size for name in names}
    for title, function, table in (
        ("swiglu_forward", swiglu_forward, FORWARD),
        ("swiglu_backward", swiglu_backward, BACKWARD),
    ):
        for name, ffn_size, launch in table.entries((512, 14336)):
            yield CompileCase(
                f"{title} {name} F={ffn_size}", function, signature, dict(launch.blocks), launch.options(), "stream"
            )
