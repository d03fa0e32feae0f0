"""One op of ours against plain torch and float64: results, all gradients, guard zones, and the same bits twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.guarded import assert_within_reference_error, guarded

Function = Callable[..., Any]


def run(function: Function, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the outputs and then the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def assert_accurate_and_confined(
    ours: Function, plain: Function, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> None:
    """Asserts the rule for every result and gradient, and that nothing around inputs and gradients was touched."""
    guards = [guarded(x) for x in (*inputs, *grads)]
    values = tuple(guard.value for guard in guards)
    got = run(ours, values[: len(inputs)], values[len(inputs) :])
    again = run(ours, values[: len(inputs)], values[len(inputs) :])
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    for guard, before in zip(guards, (*inputs, *grads), strict=True):
        guard.check()
        assert torch.equal(guard.value, before)
    native = run(plain, inputs, grads)
    exact = run(plain, tuple(x.double() for x in inputs), tuple(x.double() for x in grads))
    assert [x.dtype for x in got] == [x.dtype for x in native]
    for position, (one, other, truth) in enumerate(zip(got, native, exact, strict=True)):
        assert_within_reference_error(one, other, truth, f"result {position}")
