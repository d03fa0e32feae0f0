"""What the device can do at most: rates of bf16 matrix products and of copies, against which all else is held.

Beside them the time of an empty launch, which is in every time of a short kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kernel_bench.machine import Budget, Machine, Step
from kernel_bench.measuring import Comparison, Provider, Results, Work, measure

# M, N, K of a product [M, K] @ [N, K].T: a square one, and those of the output layer.
PRODUCTS = ((8192, 8192, 8192), (8192, 43176, 4096), (8192, 128256, 4096), (8192, 32768, 8192))
COPIED_BYTES = 4 << 30


class Ceilings(NamedTuple):
    """FLOP/s of the fastest product and bytes/s, read and written, of a copy."""

    flops: float
    bytes: float


def measure_ceilings(machine: Machine, results: Results, when: str = "first") -> Ceilings:
    """Measures both; `when` stands in the rows, as they are measured again at the end to show a drift."""
    products = ((32, 24, 16),) if machine.dry else PRODUCTS if when == "first" else PRODUCTS[:1]
    flops = [_measured(_product(*sizes, machine, when), machine, results) for sizes in products]
    results.add(_rows(_launch(machine, when), machine))
    copied = 1 << 16 if machine.dry else COPIED_BYTES
    return Ceilings(max(flops), _measured(_copy(copied, machine, when), machine, results))


def _measured(comparison: Comparison, machine: Machine, results: Results) -> float:
    rows = _rows(comparison, machine)
    results.add(rows)
    if rows[0].get("reason"):
        raise RuntimeError(f"the ceiling {comparison.kernel} {comparison.shape}: {rows[0]['reason']}")
    return 1e3 * comparison.work.amount / float(rows[0]["p50_ms"])


def _rows(comparison: Comparison, machine: Machine) -> list[dict[str, Any]]:
    """Nothing here has a floor: it is what others are held to."""
    rows = measure(comparison, machine, Budget(60.0))
    for row in rows:
        row.update(floor_ms=None, fraction_of_floor=None)
    return rows


def _product(m: int, n: int, k: int, machine: Machine, when: str) -> Comparison:
    options: dict[str, Any] = {"device": machine.device, "dtype": machine.dtype}

    def make() -> Step[None]:
        left, right = torch.randn(m, k, **options), torch.randn(n, k, **options)
        out = torch.empty(m, n, **options)

        def run(_: None) -> tuple[tuple[()], tuple[()]]:
            torch.mm(left, right.T, out=out)
            return (), ()

        return Step(run, lambda: None)

    work = Work(2.0 * m * n * k, 1.0, "TFLOP/s")
    return Comparison("matrix product", when, f"M={m} N={n} K={k}", [Provider("torch", "mm", make)], work, ((), ()))


def _copy(size: int, machine: Machine, when: str) -> Comparison:
    def make() -> Step[None]:
        source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=machine.device)
        target = torch.empty_like(source)

        def run(_: None) -> tuple[tuple[()], tuple[()]]:
            target.copy_(source)
            return (), ()

        return Step(run, lambda: None)

    shape = f"bytes={size}"
    return Comparison("copy", when, shape, [Provider("torch", "copy_", make)], Work(2.0 * size, 1.0, "GB/s"), ((), ()))


def _launch(machine: Machine, when: str) -> Comparison:
    """The least a time can be: two events around a kernel that does nothing."""

    def make() -> Step[None]:
        element = torch.empty(1, device=machine.device)

        def run(_: None) -> tuple[tuple[()], tuple[()]]:
            element.zero_()
            return (), ()

        return Step(run, lambda: None)

    provider = Provider("torch", "zero_ of one element", make)
    return Comparison("launch", when, "elements=1", [provider], Work(8.0, 1.0, "GB/s"), ((), ()))
