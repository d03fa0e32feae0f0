from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels import rms_norm


def _plain(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Llama's formula, one torch op after the other."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


def _run(function: Any, hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(hidden, weight, 1e-5)
    return (out.detach(), *torch.autograd.grad(out, (hidden, weight), grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(37, 24), (3, 5, 7), (1, 1), (2, 1, 4096), (0, 8)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, assert_accurate: Any, poisoned: Any) -> None:
    hidden = poisoned(*shape, dtype=dtype, scale=3.0)
    weight, grad = poisoned(shape[-1], dtype=dtype), poisoned(*shape, dtype=dtype)
    got = _run(rms_norm, hidden, weight, grad)
    native = _run(_plain, hidden, weight, grad)
    truth = _run(_plain, hidden.double(), weight.double(), grad.double())
    assert [x.dtype for x in got] == [dtype] * 3
    for what, *values in zip(("output", "hidden", "weight"), got, native, truth, strict=True):
        assert_accurate(what, *values)


def test_output_has_the_bits_of_llamas_formula(poisoned: Any) -> None:
    hidden, weight = poisoned(64, 96, dtype=torch.bfloat16, scale=3.0), poisoned(96, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(hidden, weight, 1e-6), _plain(hidden, weight, 1e-6))


def test_gradients_are_rounded_once(poisoned: Any) -> None:
    inputs = [poisoned(*shape, dtype=torch.bfloat16) for shape in ((64, 96), (96,), (64, 96))]
    _, *narrow = _run(rms_norm, *inputs)
    _, *wide = _run(rms_norm, *(x.float() for x in inputs))
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one, other.bfloat16())


def test_a_wider_weight_keeps_the_dtype_of_the_tokens(poisoned: Any) -> None:
    hidden = poisoned(5, 8, dtype=torch.bfloat16)
    weight = poisoned(8).detach().requires_grad_()
    out = rms_norm(hidden, weight, 1e-6)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_tokens_of_zeros_and_of_huge_numbers_stay_finite() -> None:
    hidden = torch.stack([torch.zeros(8), torch.full((8,), 1e18)]).requires_grad_()
    out = rms_norm(hidden, torch.ones(8), 1e-5)
    out.sum().backward()
    assert torch.equal(out[0], torch.zeros(8))
    assert torch.allclose(out[1], torch.ones(8))
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_gradients_against_finite_differences() -> None:
    inputs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), inputs)


def test_nothing_wide_is_kept_for_backward() -> None:
    kept: list[int] = []
    hidden = torch.randn(50, 32).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        rms_norm(hidden, torch.ones(32).bfloat16().requires_grad_(), 1e-5)
    assert sum(kept) == 2 * 50 * 32 + 2 * 32 + 4 * 50


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(8)
    for index in (0, 1):
        tensors = [hidden.clone(), weight.clone()]
        tensors[index].requires_grad_()
        rms_norm(*tensors, 1e-5).sum().backward()
        assert tensors[index].grad is not None and tensors[1 - index].grad is None


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(4, 8\) and weight \(7,\)"):
        rms_norm(torch.zeros(4, 8), torch.zeros(7), 1e-5)
