"""RMSNorm, rotary embedding and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron_cpt.kernels import add_rms_norm, packed_swiglu, rms_norm, rope, rotary_table, swiglu
from tests.kernels.comparing import assert_accurate_and_confined, run

EPSILON = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, FP32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(hidden.dtype)


def _plain_add_norm(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden + residual
    return _plain_norm(total, weight), total


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4096, 4096), BF16),
        ((4097, 4096), FP16),
        ((1000, 4096), FP32),
        ((1001, 5120), BF16),
        ((8191, 515), BF16),
        ((777, 8192), BF16),
        ((300, 9001), BF16),
        ((512, 16384), BF16),
        ((64, 32768), BF16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("allocations")
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, normal: Any, sized: Any) -> None:
    num_tokens, hidden_size = sized(shape, (5, min(shape[1], 200)))
    hidden, residual, *grads = (normal(num_tokens, hidden_size, dtype=dtype, scale=3.0) for _ in range(4))
    weight = normal(hidden_size, dtype=dtype)

    def ours(*tensors: Tensor) -> Any:
        return rms_norm(*tensors, EPSILON, implementation="triton")

    def ours_add(*tensors: Tensor) -> Any:
        return add_rms_norm(*tensors, EPSILON, implementation="triton")

    assert_accurate_and_confined(ours, _plain_norm, (hidden, weight), (grads[0],))
    assert_accurate_and_confined(ours_add, _plain_add_norm, (hidden, residual, weight), tuple(grads))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (5, 1, 64)], ids=str)
@pytest.mark.usefixtures("allocations")
def test_rope(heads: tuple[int, int, int], dtype: torch.dtype, device: str, normal: Any, sized: Any) -> None:
    num_heads, num_groups, head_size = heads
    num_tokens, pairs = sized(4099, 3), head_size // 2
    positions = torch.arange(num_tokens, device=device) * 3
    table = rotary_table(500000.0 ** -(torch.arange(pairs) / pairs), positions)

    def turned(x: Tensor) -> Tensor:
        cos, sin = (part[:, None].to(x.dtype) for part in table)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    counts = num_heads, num_groups
    query, key, *grads = (normal(num_tokens, count, head_size, dtype=dtype) for count in counts * 2)

    def ours(*tensors: Tensor) -> Any:
        return rope(*tensors, *table, implementation="triton")

    assert_accurate_and_confined(ours, lambda *x: tuple(map(turned, x)), (query, key), tuple(grads))
    expected = ours(query, key)
    in_place = rope(query.clone(), key.clone(), *table, in_place=True, implementation="triton")
    assert all(torch.equal(one, other) for one, other in zip(in_place, expected, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2048, 14336), BF16), ((1023, 11008), FP16), ((513, 1001), FP32)], ids=str
)
@pytest.mark.usefixtures("allocations")
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, normal: Any, sized: Any) -> None:
    shape = sized(shape, (3, 70))
    gate, up, grad = (normal(*shape, dtype=dtype, scale=3.0) for _ in range(3))
    assert_accurate_and_confined(
        lambda *x: swiglu(*x, implementation="triton"), lambda g, u: silu(g) * u, (gate, up), (grad,)
    )
    halves = run(lambda x: packed_swiglu(x, implementation="triton"), (torch.cat((gate, up), -1),), (grad,))
    apart = run(lambda *x: swiglu(*x, implementation="triton"), (gate, up), (grad,))
    assert torch.equal(halves[0], apart[0])
    assert torch.equal(halves[1], torch.cat(apart[1:], -1))


def test_more_than_two_to_the_31_elements(normal: Any, sized: Any) -> None:
    """Offsets of the last rows do not fit 32 bits."""
    num_tokens, size = sized((1 << 31) // 8192 + 3, 3), sized(8192, 64)
    hidden, weight = normal(num_tokens, size), normal(size)
    tail = slice(num_tokens - 3, num_tokens)
    last: Callable[[Tensor], Tensor] = lambda x: x[tail]  # noqa: E731
    assert torch.equal(
        last(rms_norm(hidden, weight, EPSILON, implementation="triton")),
        rms_norm(last(hidden), weight, EPSILON, implementation="triton"),
    )
    assert torch.equal(
        last(swiglu(hidden, hidden, implementation="triton")),
        swiglu(last(hidden), last(hidden), implementation="triton"),
    )
