"""Triton's interpreter with a bf16 that rounds and multiplies as a GPU does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to the nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@contextlib.contextmanager
def mended_interpreter() -> Iterator[None]:
    """Mends what the interpreter does wrongly with bf16, which it keeps as 16-bit integers.

    It cuts fp32 off where a GPU rounds it, casts integers and fp16 by their bits, and hands the integers to
    NumPy's matrix product. Arithmetic on bf16 without a cast to fp32 stays wrong: kernels have to cast.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    wrong_cast, wrong_fp_to_fp, wrong_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast(self: Any, source: Any, destination: Any) -> Any:
        before, after = source.dtype.scalar, destination.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return wrong_cast(self, source, destination)
        values = _widen(source.data) if before == tl.bfloat16 else source.data.astype(np.float32)
        if after == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bf16(values), after)
        return wrong_cast(self, interpreter.TensorHandle(values, tl.float32), destination)

    def fp_to_fp(self: Any, source: Any, destination: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, destination.scalar):
            return cast(self, source, destination)
        return wrong_fp_to_fp(self, source, destination, rounding)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widen(handle.data), tl.float32)

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return wrong_dot(self, widened(a), widened(b), accumulator, *options)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, fp_to_fp, dot
    try:
        yield
    finally:
        builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = wrong_cast, wrong_fp_to_fp, wrong_dot
