from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron_cpt.kernels import packed_swiglu, swiglu
from megatron_cpt.kernels.tuning import Launch
from tests.kernels.comparing import assert_accurate_and_confined, run

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["torch", "triton"])

pytestmark = pytest.mark.usefixtures("triton")


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _plain_packed(gate_up: Tensor) -> Tensor:
    return _plain(*gate_up.chunk(2, -1))


def _values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 3).to(dtype)


@DTYPES
@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(37, 24), (3, 5, 7), (9, 1), (3, 2500), (0, 8), (4, 0)], ids=str)
@pytest.mark.usefixtures("allocations")
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, implementation: str) -> None:
    gate, up, grad = (_values(*shape, dtype=dtype) for _ in range(3))
    assert_accurate_and_confined(lambda *x: swiglu(*x, implementation=implementation), _plain, (gate, up), (grad,))
    packed = torch.cat((gate, up), -1)
    assert_accurate_and_confined(
        lambda x: packed_swiglu(x, implementation=implementation), _plain_packed, (packed,), (grad,)
    )


@IMPLEMENTATIONS
@pytest.mark.usefixtures("allocations")
def test_strides(implementation: str) -> None:
    tokens, grad = _values(5, 6, 64, dtype=torch.bfloat16), _values(6, 5, 16, dtype=torch.bfloat16)
    for packed in (tokens.transpose(0, 1)[..., 8:40], tokens.transpose(0, 1)[..., 1::2]):
        assert_accurate_and_confined(
            lambda x: packed_swiglu(x, implementation=implementation), _plain_packed, (packed,), (grad,)
        )
        assert_accurate_and_confined(
            lambda *x: swiglu(*x, implementation=implementation), _plain, packed.flip(-1).chunk(2, -1), (grad,)
        )


def test_the_torch_implementation_has_the_bits_of_two_steps() -> None:
    packed, grad = _values(50, 32, dtype=torch.bfloat16), _values(50, 16, dtype=torch.bfloat16)
    ours, plain = (run(function, (packed,), (grad,)) for function in (packed_swiglu, _plain_packed))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_far_gates_stay_finite(implementation: str) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4])
    up, grad = torch.full((6,), 2.0), torch.ones(6)
    out, grad_gate, grad_up = run(lambda *x: swiglu(*x, implementation=implementation), (gate, up), (grad,))
    assert torch.allclose(out, torch.tensor([0.0, 0.0, 0.0, 0.0, 180.0, 2e4]), atol=1e-30)
    assert torch.allclose(grad_gate, torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 2.0]), atol=1e-30)
    assert torch.allclose(grad_up, torch.tensor([0.0, 0.0, 0.0, 0.0, 90.0, 1e4]), atol=1e-30)


@IMPLEMENTATIONS
def test_only_the_inputs_are_kept(implementation: str) -> None:
    kept: list[int] = []
    packed = _values(50, 32, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        packed_swiglu(packed, implementation=implementation)
    assert kept == [packed.nbytes]


@IMPLEMENTATIONS
def test_frozen_inputs_get_no_gradient(implementation: str) -> None:
    for index in (0, 1):
        leaves = [_values(4, 8).requires_grad_(position == index) for position in range(2)]
        swiglu(*leaves, implementation=implementation).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [position == index for position in range(2)]


def test_gradients_against_finite_differences() -> None:
    inputs = _values(3, 5).double().requires_grad_(), _values(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(swiglu, inputs)
    assert torch.autograd.gradcheck(packed_swiglu, (_values(3, 6).double().requires_grad_(),))


def test_a_row_may_take_several_programs() -> None:
    from megatron_cpt.kernels.swiglu import triton_kernels

    inputs, grads = (_values(3, 50), _values(3, 50)), (_values(3, 50),)

    def ours(*x: Tensor) -> Any:
        return swiglu(*x, implementation="triton")

    whole = run(ours, inputs, grads)
    small = Launch(1, blocks={"BLOCK_F": 16})
    with triton_kernels.FORWARD.using(small), triton_kernels.BACKWARD.using(small):
        assert all(torch.equal(one, other) for one, other in zip(run(ours, inputs, grads), whole, strict=True))


def test_what_does_not_belong_together_is_named() -> None:
    with pytest.raises(ValueError, match=r"gate \(4, 8\) in torch.float32 and up \(4, 9\)"):
        swiglu(torch.zeros(4, 8), torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"got \(4, 7\); expected \[\.\.\., 2 F\]"):
        packed_swiglu(torch.zeros(4, 7))
