"""Kernels on the rows of a chunk's logits, and how they are launched.

Both stream through memory: a program takes one row, reads it once and, for the gradient, writes it once.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from megatron_cpt.kernels.cross_entropy.plan import TRITON_STRIDE
from megatron_cpt.kernels.tuning import CompileCase, Launch, Table

VECTOR_BYTES = 16
_PAD = tl.constexpr(TRITON_STRIDE)


def _rule(columns: int) -> Launch:
    """More than this in one block costs registers and gains no bandwidth; less leaves a short row's lanes idle."""
    block = min(max(triton.next_power_of_2(columns), 1024), 4096)
    return Launch(num_warps=block // 512, blocks={"BLOCK": block})


STATISTICS = Table(_rule)
GRADIENT = Table(_rule)


@triton.jit
def _soft_capped(logits, softcap):
    """softcap * tanh(logits / softcap), and its derivative."""
    ratio = logits / softcap
    square = ratio * ratio
    decay = tl.exp(-2.0 * tl.abs(ratio))
    far = (1.0 - decay) / (1.0 + decay)
    far = tl.where(ratio < 0, -far, far)
    # 1 - decay cancels near zero; there the odd series, whose first term left out is below 2e-9 of the whole.
    series = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    series = -17.0 / 315.0 + square * series
    series = 2.0 / 15.0 + square * series
    series = -1.0 / 3.0 + square * series
    near = ratio + ratio * square * series
    tanh = tl.where(square < 0.09, near, far)
    return softcap * tanh, 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit(do_not_specialize=["num_columns"])
def cross_entropy_statistics(
    logits_ptr,
    columns_ptr,
    out_ptr,
    stride,
    out_stride,
    num_columns,
    softcap,
    HAS_CAP: tl.constexpr,
    WITH_SUM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Greatest logit, sum of exponentials relative to it, the label's logit and the sum of the logits of one row.

    Each vector of VECTOR columns keeps its own greatest and sum, so that a logit costs one exponential and the
    vectors meet once, at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    softcap = tl.cast(softcap, tl.float32)
    # Whole vectors are loaded up to the padded end of the row, and what lies behind the last column is dropped.
    padded = (num_columns + (_PAD - 1)) // _PAD * _PAD
    offsets = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    peak = tl.full((BLOCK // VECTOR,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    plain = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + offsets
        logits = tl.load(logits_ptr + columns, mask=columns < padded, other=0.0).to(tl.float32)
        if HAS_CAP:
            logits, _ = _soft_capped(logits, softcap)
        inside = columns < num_columns
        if WITH_SUM:
            plain += tl.sum(tl.where(inside, logits, 0.0), 1)
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a vector that has seen no column yet
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        peak = higher
    greatest = tl.max(peak, 0)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    label = tl.load(columns_ptr + row)
    present = (label >= 0) & (label < num_columns)
    target = tl.load(logits_ptr + label, mask=present, other=0.0).to(tl.float32)
    if HAS_CAP:
        target, _ = _soft_capped(target, softcap)
    out_ptr += row
    tl.store(out_ptr, greatest)
    tl.store(out_ptr + out_stride, tl.sum(total * tl.exp(peak - base), 0))
    tl.store(out_ptr + 2 * out_stride, target)
    if WITH_SUM:
        tl.store(out_ptr + 3 * out_stride, tl.sum(plain, 0))


@triton.jit(do_not_specialize=["num_columns"])
def cross_entropy_gradient(
    logits_ptr,
    out_ptr,
    columns_ptr,
    lse_ptr,
    grad_ptr,
    stride,
    out_stride,
    num_columns,
    label_share,
    other_share,
    z_loss,
    softcap,
    HAS_CAP: tl.constexpr,
    NARROWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one row, written over its logits.

    NARROWER: the gradient's elements are half as wide, so that a block is written where an earlier one was read.
    Then all warps must have read their share of a block before any writes.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    out_ptr += row * out_stride
    softcap = tl.cast(softcap, tl.float32)
    label_share = tl.cast(label_share, tl.float32)
    other_share = tl.cast(other_share, tl.float32)
    lse = tl.load(lse_ptr + row)
    grad = tl.load(grad_ptr + row)
    silent = (grad == 0.0) & (lse == lse)  # no gradient, however great the logits are; an invalid label stays NaN
    label = tl.load(columns_ptr + row)
    label = tl.where((label >= 0) & (label < num_columns), label, -1).to(tl.int32)
    factor = 1.0 + 2.0 * tl.cast(z_loss, tl.float32) * lse
    padded = (num_columns + (_PAD - 1)) // _PAD * _PAD
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < padded
        logits = tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        slope = 1.0
        if HAS_CAP:
            logits, slope = _soft_capped(logits, softcap)
        share = tl.exp(logits - lse) * factor - other_share
        share = tl.where(columns == label, share - label_share, share) * slope
        share = tl.where(silent, 0.0, share * grad)
        if NARROWER:
            tl.debug_barrier()
        tl.store(out_ptr + columns, share.to(out_ptr.dtype.element_ty), mask=mask)


def compile_cases() -> Iterator[CompileCase]:
    """Yields every kernel with every launch setting, and the dtypes and options whose machine code differs."""
    pointers = {"columns_ptr": "*i64:16", "stride": "i32:16", "out_stride": "i32:16", "num_columns": "i32"}
    factors = {"softcap": "fp32", "label_share": "fp32", "other_share": "fp32", "z_loss": "fp32"}
    keys = (1000, 128256)
    for table, key, launch in STATISTICS.entries(keys):
        for logits, options in (("bf16", False), ("fp32", False), ("fp32", True)):
            yield CompileCase(
                f"cross_entropy_statistics {table} M={key} {logits}{' softcap smoothing' if options else ''}",
                cross_entropy_statistics,
                {**pointers, "logits_ptr": f"*{logits}:16", "out_ptr": "*fp32", "softcap": "fp32"},
                {
                    **launch.blocks,
                    **{
                        "HAS_CAP": options,
                        "WITH_SUM": options,
                        "VECTOR": VECTOR_BYTES // (4 if logits == "fp32" else 2),
                    },
                },
                launch.options(),
                "stream",
            )
    for table, key, launch in GRADIENT.entries(keys):
        for logits, out, has_cap in (
            ("bf16", "bf16", False),
            ("fp16", "bf16", False),
            ("fp32", "bf16", False),
            ("fp32", "bf16", True),
            ("fp32", "fp32", True),
        ):
            yield CompileCase(
                f"cross_entropy_gradient {table} M={key} {logits} to {out}{' softcap' if has_cap else ''}",
                cross_entropy_gradient,
                {
                    **pointers,
                    **factors,
                    **{"logits_ptr": f"*{logits}:16", "out_ptr": f"*{out}:16"},
                    **{"lse_ptr": "*fp32:16", "grad_ptr": "*fp32:16"},
                },
                {"HAS_CAP": has_cap, "NARROWER": (logits, out) == ("fp32", "bf16"), **launch.blocks},
                launch.options(),
                "stream",
            )
