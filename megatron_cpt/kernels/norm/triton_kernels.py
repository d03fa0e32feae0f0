"""Kernels of RMSNorm, with the residual sum that precedes it where one is given.

Shape letters: N tokens, D hidden size, P programs of the backward pass.

A program of the forward pass holds whole rows in registers where D allows, and otherwise reads a row twice, the
second time mostly from cache. The backward pass makes the tokens' gradient and the weight's: up to `FUSED_SIZE` in
one kernel, whose P programs each take every P-th block of rows and keep a partial sum of the weight's gradient in
registers; beyond it in two, as the sums would leave the registers. The partial sums [P, D] are added in a fixed
order, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from megatron_cpt.kernels.tuning import CompileCase, Launch, Table

FUSED_SIZE = 8192  # largest D whose weight gradient is summed in registers
_HELD_SIZE = 16384  # largest D whose row the forward pass holds in registers


def _forward_rule(hidden_size: int) -> Launch:
    """Short rows share a program, so that a thread has 32 elements: 16 bytes four times, in bf16."""
    block = min(triton.next_power_of_2(hidden_size), _HELD_SIZE)
    rows = max(2048 // block, 1)
    return Launch(num_warps=min(max(block * rows // 1024, 1), 16), blocks={"BLOCK_N": rows, "BLOCK_D": block})


def _backward_rule(hidden_size: int) -> Launch:
    """Few programs, as each leaves a partial sum: the next rows are on their way while one adds up the last.

    Above 4096 elements the registers are enough for one program a multiprocessor.
    """
    block = min(triton.next_power_of_2(hidden_size), FUSED_SIZE)
    rows = max(4096 // block, 1)
    blocks = {"BLOCK_N": rows, "BLOCK_D": block}
    return Launch(num_warps=max(block * rows // 512, 8), num_stages=2, blocks=blocks, programs=1 if block > 4096 else 2)


FORWARD = Table(_forward_rule)
BACKWARD = Table(_backward_rule)
WIDE_BACKWARD = Table(lambda _: Launch(num_warps=8, blocks={"BLOCK_D": 4096}))
WIDE_WEIGHT = Table(lambda _: Launch(num_warps=4, num_stages=3, blocks={"BLOCK_N": 4, "BLOCK_D": 512}, programs=8))


@triton.jit
def rms_norm_forward(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    sum_ptr,
    inverse_ptr,
    num_tokens,
    hidden_size,
    hidden_stride,
    residual_stride,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes weight * cast(x / rms(x)) and 1 / rms(x); with a residual x is the rounded sum, which it writes too."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = (rows < num_tokens)[:, None]
    hidden_rows = hidden_ptr + (rows * hidden_stride)[:, None]
    residual_rows = residual_ptr + (rows * residual_stride)[:, None]
    out_rows = (rows * hidden_size)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    epsilon = tl.cast(epsilon, tl.float32)
    dtype = normed_ptr.dtype.element_ty
    if ONE_BLOCK:
        mask = in_rows & (columns < hidden_size)
        x = tl.load(hidden_rows + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            rounded = (x + tl.load(residual_rows + columns, mask=mask, other=0.0).to(tl.float32)).to(dtype)
            tl.store(sum_ptr + out_rows + columns, rounded, mask=mask)
            x = rounded.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / hidden_size + epsilon)
        normed = (x * inverse[:, None]).to(dtype).to(tl.float32)
        tl.store(normed_ptr + out_rows + columns, (normed * weight).to(dtype), mask=mask)
    else:
        squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, hidden_size, BLOCK_D):
            mask = in_rows & (start + columns < hidden_size)
            x = tl.load(hidden_rows + start + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                rounded = (x + tl.load(residual_rows + start + columns, mask=mask, other=0.0).to(tl.float32)).to(dtype)
                tl.store(sum_ptr + out_rows + start + columns, rounded, mask=mask)
                x = rounded.to(tl.float32)
            squares += x * x
        inverse = tl.rsqrt(tl.sum(squares, 1) / hidden_size + epsilon)
        for start in range(0, hidden_size, BLOCK_D):
            mask = in_rows & (start + columns < hidden_size)
            x = tl.load(hidden_rows + start + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                # Added again rather than read back: other threads wrote what this one would read.
                x = x + tl.load(residual_rows + start + columns, mask=mask, other=0.0).to(tl.float32)
                x = x.to(dtype).to(tl.float32)
            weight = tl.load(weight_ptr + start + columns, mask=start + columns < hidden_size, other=0.0).to(tl.float32)
            normed = (x * inverse[:, None]).to(dtype).to(tl.float32)
            tl.store(normed_ptr + out_rows + start + columns, (normed * weight).to(dtype), mask=mask)
    tl.store(inverse_ptr + rows, inverse, mask=rows < num_tokens)


@triton.jit
def rms_norm_backward(
    grad_ptr,
    grad_sum_ptr,
    hidden_ptr,
    weight_ptr,
    inverse_ptr,
    grad_hidden_ptr,
    partial_ptr,
    num_tokens,
    hidden_size,
    grad_stride,
    grad_sum_stride,
    hidden_stride,
    HAS_GRAD_SUM: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the tokens' gradient and this program's partial sum of the weight's, for rows of one block."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    in_columns = columns < hidden_size
    weight = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    step = tl.num_programs(0) * BLOCK_N
    for first in tl.range(tl.program_id(0) * BLOCK_N, num_tokens, step, num_stages=NUM_STAGES):
        rows = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (rows < num_tokens)[:, None] & in_columns
        grad = tl.load(grad_ptr + (rows * grad_stride)[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden_ptr + (rows * hidden_stride)[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + rows, mask=rows < num_tokens, other=0.0)[:, None]
        normed = x * inverse
        if WITH_WEIGHT:
            partial += grad * normed
        scaled = grad * weight
        along = tl.sum(scaled * normed, 1)[:, None] / hidden_size
        grad_hidden = (scaled - normed * along) * inverse
        if HAS_GRAD_SUM:
            offsets = (rows * grad_sum_stride)[:, None] + columns
            grad_hidden += tl.load(grad_sum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = (rows * hidden_size)[:, None] + columns
        tl.store(grad_hidden_ptr + offsets, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
    if WITH_WEIGHT:
        offsets = tl.program_id(0).to(tl.int64) * hidden_size + columns
        tl.store(partial_ptr + offsets, tl.sum(partial, 0)[None, :], mask=in_columns)


@triton.jit
def rms_norm_wide_backward(
    grad_ptr,
    grad_sum_ptr,
    hidden_ptr,
    weight_ptr,
    inverse_ptr,
    grad_hidden_ptr,
    hidden_size,
    grad_stride,
    grad_sum_stride,
    hidden_stride,
    HAS_GRAD_SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the gradient of one token, reading its row twice."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    grad_sum_ptr += row * grad_sum_stride
    hidden_ptr += row * hidden_stride
    inverse = tl.load(inverse_ptr + row)
    products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = columns < hidden_size
        grad = tl.load(grad_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        products += grad * weight * (x * inverse)
    along = tl.sum(products, 0) / hidden_size
    for start in range(0, hidden_size, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = columns < hidden_size
        grad = tl.load(grad_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        grad_hidden = (grad * weight - x * inverse * along) * inverse
        if HAS_GRAD_SUM:
            grad_hidden += tl.load(grad_sum_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        pointers = grad_hidden_ptr + row * hidden_size + columns
        tl.store(pointers, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_wide_weight(
    grad_ptr,
    hidden_ptr,
    inverse_ptr,
    partial_ptr,
    num_tokens,
    hidden_size,
    grad_stride,
    hidden_stride,
    NUM_STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes a partial sum of the weight's gradient: a block of columns of every P-th block of rows."""
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    partial = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    step = tl.num_programs(0) * BLOCK_N
    for first in tl.range(tl.program_id(0) * BLOCK_N, num_tokens, step, num_stages=NUM_STAGES):
        rows = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (rows < num_tokens)[:, None] & (columns < hidden_size)
        grad = tl.load(grad_ptr + (rows * grad_stride)[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(hidden_ptr + (rows * hidden_stride)[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + rows, mask=rows < num_tokens, other=0.0)[:, None]
        partial += grad * (x * inverse)
    offsets = tl.program_id(0).to(tl.int64) * hidden_size + columns
    tl.store(partial_ptr + offsets, tl.sum(partial, 0)[None, :], mask=columns < hidden_size)


def compile_cases() -> Iterator[CompileCase]:
    """Yields every kernel with every setting, at the sizes of Llama models."""
    tensor, statistics, size = "*bf16:16", "*fp32:16", "i32:16"
    sizes = {"num_tokens": "i32", "hidden_size": size, "hidden_stride": size}
    forward = {f"{name}_ptr": tensor for name in ("hidden", "residual", "weight", "normed", "sum")}
    forward |= {**sizes, "inverse_ptr": statistics, "residual_stride": size, "epsilon": "fp32"}
    for name, hidden_size, launch in FORWARD.entries((512, 4096, 5120, 16384, 32768)):
        for has_residual in (False, True):
            constexprs = {
                "HAS_RESIDUAL": has_residual,
                "ONE_BLOCK": hidden_size <= launch.blocks["BLOCK_D"],
                **launch.blocks,
            }
            title = f"rms_norm_forward {name} D={hidden_size}{' residual' * has_residual}"
            yield CompileCase(title, rms_norm_forward, forward, constexprs, launch.options(), "stream")
    backward = {f"{name}_ptr": tensor for name in ("grad", "grad_sum", "hidden", "weight", "grad_hidden")}
    backward |= {**sizes, "inverse_ptr": statistics, "partial_ptr": statistics}
    backward |= {"grad_stride": size, "grad_sum_stride": size}
    for name, hidden_size, launch in BACKWARD.entries((512, 4096, 5120, 8192)):
        for has_sum in (False, True):
            constexprs = {
                "HAS_GRAD_SUM": has_sum,
                "WITH_WEIGHT": True,
                "NUM_STAGES": launch.num_stages,
                **launch.blocks,
            }
            title = f"rms_norm_backward {name} D={hidden_size}{' residual' * has_sum}"
            yield CompileCase(title, rms_norm_backward, backward, constexprs, launch.options(), "stream")
    for name, _, launch in WIDE_BACKWARD.entries((16384,)):
        for has_sum in (False, True):
            title = f"rms_norm_wide_backward {name}{' residual' * has_sum}"
            constexprs = {"HAS_GRAD_SUM": has_sum, **launch.blocks}
            yield CompileCase(title, rms_norm_wide_backward, backward, constexprs, launch.options(), "stream")
    for name, _, launch in WIDE_WEIGHT.entries((16384,)):
        constexprs = {"NUM_STAGES": launch.num_stages, **launch.blocks}
        title = f"rms_norm_wide_weight {name}"
        yield CompileCase(title, rms_norm_wide_weight, backward, constexprs, launch.options(), "stream")
