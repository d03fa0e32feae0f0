"""Attention over packed documents."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels import attention
from tests.kernels.comparing import assert_accurate_and_confined, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = (1, 2, 127, 128, 0, 129, 513, 1000, 64, 31, 700)
TINY = (1, 17, 0, 14)


def _plain(lengths: tuple[int, ...], window: int | None) -> Any:
    """The definition, document by document and head by head, in the dtype of the tensors."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        share, scale = query.shape[1] // key.shape[1], query.shape[2] ** -0.5
        outputs = []
        for start, stop in pairwise(accumulate(lengths, initial=0)):
            back = torch.arange(stop - start, device=query.device)
            back = back[:, None] - back
            hidden = (back < 0) | (back > (stop if window is None else window))
            heads = []
            for head in range(query.shape[1]):
                parts = query[start:stop, head], key[start:stop, head // share], value[start:stop, head // share]
                logits = (parts[0] @ parts[1].T * scale).masked_fill(hidden, -torch.inf)
                heads.append(logits.softmax(-1) @ parts[2])
            outputs.append(torch.stack(heads, 1))
        return torch.cat(outputs)

    return function


def _ours(lengths: tuple[int, ...], window: int | None, implementation: str = "triton") -> Any:
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[2] ** -0.5
        return attention(query, key, value, boundaries, scale=scale, window=window, implementation=implementation)

    return function


@pytest.mark.parametrize(
    ("lengths", "heads", "dtype", "window"),
    [
        (RAGGED, (8, 2, 128), BF16, None),
        (RAGGED, (4, 4, 64), BF16, None),
        (RAGGED, (4, 1, 96), BF16, None),
        (RAGGED, (2, 1, 256), BF16, None),
        (RAGGED, (4, 2, 128), FP16, None),
        (RAGGED, (2, 1, 64), FP32, None),
        (RAGGED, (4, 2, 128), BF16, 200),
        ((8192,), (4, 1, 128), BF16, None),
    ],
    ids=str,
)
@pytest.mark.usefixtures("allocations")
def test_values_and_gradients(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    window: int | None,
    normal: Any,
    sized: Any,
) -> None:
    lengths, window = sized(lengths, TINY), sized(window, None if window is None else 5)
    num_heads, num_groups, head_size = sized(heads, (2, 1, 16))
    counts = num_heads, num_groups, num_groups, num_heads
    *inputs, grad = (normal(sum(lengths), count, head_size, dtype=dtype) for count in counts)
    assert_accurate_and_confined(_ours(lengths, window), _plain(lengths, window), tuple(inputs), (grad,))


def test_views_of_a_packed_projection(normal: Any, sized: Any) -> None:
    """Query, key and value lie in one tensor, as a matrix product makes them."""
    lengths, (heads, groups, size) = sized(RAGGED, TINY), sized((8, 2, 128), (2, 1, 16))
    packed = normal(sum(lengths), heads + 2 * groups, size)
    views = packed.split((heads, groups, groups), 1)
    grad = normal(sum(lengths), heads, size)
    got = run(_ours(lengths, None), views, (grad,))
    apart = run(_ours(lengths, None), tuple(x.contiguous() for x in views), (grad,))
    assert all(torch.equal(one, other) for one, other in zip(got, apart, strict=True))


def test_memory_grows_with_tokens_alone(normal: Any, sized: Any, peak_bytes: Any) -> None:
    """Results, gradients, a few numbers a token and head, and partial key and value gradients of at most each head."""
    num_tokens, (heads, groups, size) = sized(16384, 24), sized((8, 2, 128), (2, 1, 16))
    counts = heads, groups, groups, heads
    *inputs, grad = (normal(num_tokens, count, size) for count in counts)
    function = _ours((num_tokens,), None)
    run(function, tuple(inputs), (grad,))
    peak = peak_bytes(lambda: run(function, tuple(inputs), (grad,)))
    results = 2 * 2 * num_tokens * (heads + groups) * size
    partial = 2 * 4 * num_tokens * heads * size
    assert peak is None or peak <= results + partial + 16 * num_tokens * heads + (8 << 20)
