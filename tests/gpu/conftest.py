"""What the tests on a GPU share. `make test-gpu` runs them; without a GPU they skip.

They import the kernels, torch, Triton and pytest alone, as a machine with a GPU may have nothing else of this
project's needs; so that target leaves the conftest of the folder above out.

With MEGATRON_CPT_GPU_TESTS=dry they run on the CPU, with tiny sizes, through Triton's interpreter: that shows that
the tests themselves are right, and nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DRY = os.environ.get("MEGATRON_CPT_GPU_TESTS") == "dry"
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def obstacle() -> str | None:
    """Returns why these tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible to torch"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 has Triton interpret its kernels; make test-gpu runs them on the GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dry run takes the first case of each test: the others differ in what only a GPU does."""
    if DRY:
        firsts = {item.nodeid.split("[")[0]: item for item in reversed(items)}
        items[:] = [item for item in items if firsts[item.nodeid.split("[")[0]] is item]


@pytest.fixture(autouse=True)
def device() -> Iterator[str]:
    """Gives torch's name of the device, or skips."""
    reason = None if DRY else obstacle()
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(30)
    if DRY:
        from tests.kernels.interpreter import mended_interpreter

        with mended_interpreter():
            yield "cpu"
        return
    yield "cuda"
    torch.cuda.empty_cache()


@pytest.fixture
def sized() -> Callable[[Any, Any], Any]:
    """Returns a function that takes the first of two values on a GPU and the second in a dry run."""
    return lambda real, tiny: tiny if DRY else real


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has every tensor that a launch allocates begin as NaN between guard zones; they are checked at the end."""
    from tests.kernels.guarded import guard_allocations

    guards = guard_allocations(monkeypatch)
    yield
    monkeypatch.undo()
    for position, guard in enumerate(guards):
        guard.check(f"allocation {position}, {tuple(guard.value.shape)}")


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], Any]], int | None]:
    """Returns a function that tells what a call takes at its peak beyond what was allocated; None in a dry run."""

    def measure(call: Callable[[], Any]) -> int | None:
        if DRY:
            call()
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before

    return measure


@pytest.fixture
def normal(device: str) -> Callable[..., Tensor]:
    """Returns a function that draws a tensor on the device, of standard deviation `scale`."""

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(scale).to(dtype)

    return draw
