from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels import add_rms_norm, rms_norm
from megatron_cpt.kernels.tuning import Launch
from tests.kernels.comparing import assert_accurate_and_confined
from tests.kernels.guarded import Guard

EPSILON = 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])

pytestmark = pytest.mark.usefixtures("triton")


def _plain(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (weight * wide.to(hidden.dtype)).to(hidden.dtype)


def _plain_add(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden + residual
    return _plain(total, weight), total


def _ours(hidden: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(hidden, weight, EPSILON, implementation="triton")


def _ours_add(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(hidden, residual, weight, EPSILON, implementation="triton")


def _tokens(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 3).to(dtype)


@DTYPES
@pytest.mark.parametrize(
    "shape", [(37, 24), (3, 5, 7), (61, 1), (2, 1, 4096), (5, 8192), (2, 9000), (0, 8), (3, 0)], ids=str
)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, allocations: list[Guard]) -> None:
    hidden, weight, grad = (_tokens(*size, dtype=dtype) for size in (shape, shape[-1:], shape))
    assert_accurate_and_confined(_ours, _plain, (hidden, weight), (grad,))
    assert allocations or not hidden.numel()


@DTYPES
@pytest.mark.parametrize("shape", [(37, 24), (61, 1), (5, 4096), (2, 9000)], ids=str)
@pytest.mark.usefixtures("allocations")
def test_values_and_gradients_with_a_residual(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, residual, weight, *grads = (
        _tokens(*size, dtype=dtype) for size in (shape, shape, shape[-1:], shape, shape)
    )
    assert_accurate_and_confined(_ours_add, _plain_add, (hidden, residual, weight), tuple(grads))


@pytest.mark.parametrize("function", [_ours, _ours_add])
def test_rows_longer_than_a_block_are_read_twice(function: Any) -> None:
    from megatron_cpt.kernels.norm import triton_kernels

    inputs = tuple(_tokens(*shape, dtype=torch.bfloat16) for shape in ([(5, 300)] * (1 + (function is _ours_add))))
    inputs = (*inputs, _tokens(300, dtype=torch.bfloat16))
    whole = function(*inputs)
    with triton_kernels.FORWARD.using(Launch(1, blocks={"BLOCK_N": 2, "BLOCK_D": 128})):
        looped = function(*inputs)
    torch.testing.assert_close(looped, whole, rtol=2**-7, atol=0)


@pytest.mark.usefixtures("allocations")
def test_strides_of_the_leading_dimensions() -> None:
    hidden = _tokens(6, 5, 48, dtype=torch.bfloat16)
    residual, grad = _tokens(5, 6, 48, dtype=torch.bfloat16), _tokens(5, 6, 16, dtype=torch.bfloat16)
    weight = _tokens(32, dtype=torch.bfloat16)[::2]
    for x in (hidden.transpose(0, 1)[..., 8:24], hidden.transpose(0, 1)[..., 1::3], hidden[::2, 1, 32:]):
        rest = residual[..., :16] if x.dim() == 3 else residual[:3, 0, :16]
        grads = (grad, grad.flip(0)) if x.dim() == 3 else (grad[:3, 0], grad[:3, 1])
        assert_accurate_and_confined(_ours_add, _plain_add, (x, rest, weight), grads)


def test_a_gradient_whose_rows_are_one() -> None:
    hidden, weight = (_tokens(*shape, dtype=torch.float32).requires_grad_() for shape in ((5, 6, 16), (16,)))
    grad = _tokens(16, dtype=torch.float32)
    expanded, repeated = (
        torch.autograd.grad(_ours(hidden, weight), (hidden, weight), x.clone() if copied else x)
        for copied, x in enumerate([grad.expand(5, 6, 16)] * 2)
    )
    assert all(torch.equal(one, other) for one, other in zip(expanded, repeated, strict=True))


def test_output_has_the_bits_of_the_torch_implementation() -> None:
    hidden, residual = _tokens(64, 96, dtype=torch.bfloat16), _tokens(64, 96, dtype=torch.bfloat16)
    weight = _tokens(96, dtype=torch.bfloat16)
    for one, other in zip(_ours_add(hidden, residual, weight), _plain_add(hidden, residual, weight), strict=True):
        assert torch.equal(one, other)


def test_a_wider_weight_keeps_the_dtype_of_the_tokens() -> None:
    inputs = _tokens(7, 24, dtype=torch.bfloat16), _tokens(24, dtype=torch.float32)
    assert_accurate_and_confined(_ours, _plain, inputs, (_tokens(7, 24, dtype=torch.bfloat16),))


def test_only_wanted_gradients_are_made() -> None:
    hidden, residual, weight = (_tokens(4, 8, dtype=torch.float32) for _ in range(3))
    weight = weight[0].clone()
    for index in range(3):
        leaves = [x.clone().requires_grad_(position == index) for position, x in enumerate((hidden, residual, weight))]
        normed, total = _ours_add(*leaves)
        normed.sum().backward(retain_graph=True)
        assert [leaf.grad is not None for leaf in leaves] == [position == index for position in range(3)]
        if index < 2:
            before = leaves[index].grad.clone()
            total.sum().backward()
            assert torch.equal(leaves[index].grad, before + 1)


def test_the_sum_is_kept_and_neither_stream() -> None:
    kept: list[int] = []
    streams = [torch.randn(50, 32).bfloat16().requires_grad_() for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        _ours_add(*streams, torch.ones(32).bfloat16().requires_grad_())
    assert sum(kept) == 2 * 50 * 32 + 2 * 32 + 4 * 50


def test_what_does_not_belong_together_is_named() -> None:
    with pytest.raises(ValueError, match=r"residual \(4, 9\) in torch.float32"):
        add_rms_norm(torch.zeros(4, 8), torch.zeros(4, 9), torch.zeros(8), EPSILON)
