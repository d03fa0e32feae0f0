"""AdamW against torch's, and the learning rate at its corners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.config.schema import OptimizerConfig
from megatron_cpt.training.optimizer import AdamW, learning_rate

STEPS = 20
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


def walk(kind: type[torch.optim.Optimizer], dtype: torch.dtype, steps: int = STEPS) -> list[Tensor]:
    """Twenty steps on a matrix that decays and a vector that does not, with a rate that changes."""
    draw = torch.Generator().manual_seed(3)
    params = [torch.randn(5, 7, generator=draw, dtype=torch.float64), torch.randn(7, generator=draw).double()]
    params = [p.to(dtype).requires_grad_() for p in params]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, (0.1, 0.0), strict=True)]
    optimizer = kind(groups, lr=1e-2, **OPTIONS)  # type: ignore[call-arg]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        for p in params:
            scale = 10.0 ** (step % 5 - 3)  # the second moment forgets slowly
            p.grad = (torch.randn(p.shape, generator=draw, dtype=torch.float64) * scale).to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


def test_adamw_equals_torch_in_float64() -> None:
    for ours, theirs in zip(walk(AdamW, torch.float64), walk(torch.optim.AdamW, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_adamw_in_fp32_is_as_exact_as_torch() -> None:
    truth = walk(torch.optim.AdamW, torch.float64)
    ours, theirs = walk(AdamW, torch.float32), walk(torch.optim.AdamW, torch.float32)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        error, native = ((x.double() - exact).abs().max().item() for x in (a, b))
        assert error <= 2 * native + 1e-7, (error, native)


def test_one_step_counter_for_a_group() -> None:
    """The engine's distributed optimizer restores the counter of a group, not tensors of every parameter."""
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_coupled_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        AdamW([torch.zeros(1)], adam_w_mode=False)


def test_learning_rate_at_its_corners() -> None:
    config = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-5, warmup_steps=10)
    rates = [learning_rate(config, step, 111) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[10] == 1e-3
    assert rates[-1] == pytest.approx(1e-5, rel=1e-12)
    assert rates[60] == pytest.approx((1e-3 + 1e-5) / 2)  # half-way down
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(config, 500, 111) == pytest.approx(1e-5, rel=1e-12)
    assert rates[35] == pytest.approx(1e-5 + 0.99e-3 * (1 + math.cos(math.pi / 4)) / 2)


def test_learning_rate_without_warmup_and_in_one_step() -> None:
    config = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-5)
    assert learning_rate(config, 0, 100) == 1e-3
    assert learning_rate(config, 0, 1) == 1e-3
    warm = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-5, warmup_steps=4)
    assert [learning_rate(warm, step, 4) for step in range(4)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
