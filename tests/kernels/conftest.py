"""What the tests of all ops share: the rule by which an op is judged, and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy import plan
from tests.kernels.guarded import Guard, assert_within_reference_error, guard_allocations
from tests.kernels.interpreter import mended_interpreter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def assert_accurate() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """Asserts that an error is at most twice that of the native op in the same dtype, plus two ulp of the scale."""

    def check(what: str, got: Tensor, native: Tensor, truth: Tensor) -> None:
        assert_within_reference_error(got, native, truth, what)

    return check


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Guard]]:
    """Has every tensor that a launch allocates begin as NaN between guard zones; they are checked at the end."""
    guards = guard_allocations(monkeypatch)
    yield guards
    monkeypatch.undo()
    for position, guard in enumerate(guards):
        guard.check(f"allocation {position}, {tuple(guard.value.shape)}")


@pytest.fixture
def triton() -> Iterator[None]:
    """Skips where Triton is not installed, and mends the bf16 of its interpreter (`mended_interpreter`)."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is set, and not to 1")
    with mended_interpreter():
        yield


@pytest.fixture
def budget_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the budget alone decide whether logits are kept: tables are so small that a sum over chunks often is less."""
    monkeypatch.setattr(plan, "allowance", lambda call, *_: call.budget_bytes)


@pytest.fixture
def poisoned() -> Callable[..., Tensor]:
    """Returns a function that makes a random tensor lie inside a larger one that is NaN everywhere else."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        around = torch.full([size + 4 for size in shape], torch.nan, dtype=dtype)
        inside = around[tuple(slice(2, 2 + size) for size in shape)]
        return inside.copy_(torch.randn(*shape, dtype=torch.float64) * scale)

    return make
