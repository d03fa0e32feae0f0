"""What the tests of all ops share: the rule by which an op is judged, and poisoned memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def assert_accurate() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """Asserts that an error is at most twice that of the native op in the same dtype, plus two ulp of the scale."""

    def check(what: str, got: Tensor, native: Tensor, truth: Tensor) -> None:
        assert got.shape == truth.shape, what
        assert torch.isfinite(got).all(), what
        scale = truth.abs().max().item() if truth.numel() else 0.0
        for norm in (torch.inf, 2):
            error, native_error = (
                torch.linalg.vector_norm((x.double() - truth).flatten(), norm).item() if truth.numel() else 0.0
                for x in (got, native)
            )
            ulp = torch.finfo(got.dtype).eps * scale * (1 if norm == torch.inf else truth.numel() ** 0.5)
            assert error <= 2 * native_error + 2 * ulp, f"{what}: {error:.3g} against {native_error:.3g}, norm {norm}"

    return check


@pytest.fixture
def poisoned() -> Callable[..., Tensor]:
    """Returns a function that makes a random tensor lie inside a larger one that is NaN everywhere else."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        around = torch.full([size + 4 for size in shape], torch.nan, dtype=dtype)
        inside = around[tuple(slice(2, 2 + size) for size in shape)]
        return inside.copy_(torch.randn(*shape, dtype=torch.float64) * scale)

    return make
