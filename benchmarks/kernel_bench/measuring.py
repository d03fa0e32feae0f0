"""One comparison: every provider of an op on the same inputs, timed in turns, each with its error and its memory."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_bench.machine import Budget, Machine, Step, Tensors

COLUMNS = (
    "kernel",
    "provider",
    "setting",
    "mode",
    "shape",
    "dtype",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "rounds",
    "rate",
    "rate_unit",
    "floor_ms",
    "fraction_of_floor",
    "peak_mib",
    "gradients_mib",
    "error_output",
    "error_gradient",
    "error_gradients",
    "reason",
    "gpu",
    "torch",
    "triton",
    "driver",
    "commit",
    "date",
)
MOST_ROUNDS = 40
LEAST_ROUNDS = 5
MOST_SECONDS = 8.0  # for the rounds of a comparison
OURS = "megatron_cpt"


@dataclass(frozen=True)
class Provider:
    """One way to compute the op.

    Attributes:
        name: whose, with a version where it is a package.
        setting: what distinguishes it from others of the same name.
        make: builds the step; whatever it raises stands in the row as the reason why there are no figures.
    """

    name: str
    setting: str
    make: Callable[[], Step[Any]]


@dataclass(frozen=True)
class Work:
    """What an op has to do at the least, for the floor.

    Attributes:
        amount: FLOPs of a matrix op, bytes of a streaming one.
        ceiling: the same a second, as measured at the beginning of the run.
        unit: "TFLOP/s" or "GB/s".
    """

    amount: float
    ceiling: float
    unit: str

    @property
    def floor_ms(self) -> float:
        """Returns the time it takes at the ceiling."""
        return 1e3 * self.amount / self.ceiling

    def rate(self, milliseconds: float) -> float:
        """Returns the rate in `unit`."""
        return self.amount / milliseconds / {"TFLOP/s": 1e9, "GB/s": 1e6}[self.unit]


@dataclass(frozen=True)
class Comparison:
    """One op at one shape.

    Attributes:
        exact: outputs and gradients in float64.
        gradients_mib: what the gradients take, which every provider has to allocate.
    """

    kernel: str
    mode: str
    shape: str
    providers: Sequence[Provider]
    work: Work
    exact: Tensors
    gradients_mib: float = 0.0


class Results:
    """The rows, on disk after each comparison: what ends a run early leaves what was measured."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path, self.machine = path, machine
        self.rows: list[dict[str, str]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows and prints them."""
        for row in rows:
            text = {name: _text(row.get(name, self.machine.facts.get(name, ""))) for name in COLUMNS}
            self.rows.append(text)
            print(_line(text), flush=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def measure(comparison: Comparison, machine: Machine, budget: Budget) -> list[dict[str, Any]]:
    """Returns a row for each provider, those without figures with the reason."""
    ready: list[tuple[Provider, Step[Any]]] = []
    rows: dict[int, dict[str, Any]] = {}
    for provider in comparison.providers:
        row = rows[id(provider)] = _empty_row(comparison, provider, machine)
        if budget.left() <= 0:
            row["reason"] = f"not run: the {budget.seconds:.0f} s of this part were over"
            continue
        try:
            machine.free()
            step = provider.make()
            row.update(_errors(step, comparison.exact))
            row["peak_mib"] = machine.peak_mib(step)
            ready.append((provider, step))
        except Exception as error:  # a peer may fail in any way; how it failed is what its row says
            row["reason"] = reason_of(error)
    for provider, times in _time_in_turns(ready, rows, machine, budget):
        rows[id(provider)].update(_figures(times, comparison.work))
    return list(rows.values())


def _empty_row(comparison: Comparison, provider: Provider, machine: Machine) -> dict[str, Any]:
    return {
        "kernel": comparison.kernel,
        "provider": provider.name,
        "setting": provider.setting,
        "mode": comparison.mode,
        "shape": comparison.shape,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "floor_ms": comparison.work.floor_ms,
        "gradients_mib": comparison.gradients_mib,
    }


def _time_in_turns(
    ready: list[tuple[Provider, Step[Any]]], rows: dict[int, dict[str, Any]], machine: Machine, budget: Budget
) -> list[tuple[Provider, list[float]]]:
    """Times all providers round by round, each round in another order.

    Between `LEAST_ROUNDS` and `MOST_ROUNDS` rounds, no longer than `MOST_SECONDS` or a quarter of what the budget has
    left.
    """
    times: dict[int, list[float]] = {id(provider): [] for provider, _ in ready}
    seconds = Budget(min(max(budget.left(), 0.0) / 4, MOST_SECONDS))
    least, most = (1, 1) if machine.dry else (LEAST_ROUNDS, MOST_ROUNDS)
    for round_ in range(most):
        if round_ >= least and seconds.left() <= 0:
            break
        turn = round_ % max(len(ready), 1)
        for provider, step in ready[turn:] + ready[:turn]:
            if rows[id(provider)].get("reason"):
                continue
            try:
                times[id(provider)].append(machine.time(step))
            except Exception as error:
                rows[id(provider)]["reason"] = reason_of(error)
    return [(provider, times[id(provider)]) for provider, _ in ready if not rows[id(provider)].get("reason")]


def _figures(times: list[float], work: Work) -> dict[str, Any]:
    p20, p50, p80 = quantiles(times)
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "rounds": len(times),
        "rate": work.rate(p50),
        "rate_unit": work.unit,
        "fraction_of_floor": work.floor_ms / p50,
    }


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Returns the 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def _errors(step: Step[Any], exact: Tensors) -> dict[str, Any]:
    """Returns the relative errors in the 2-norm: the greatest of the outputs', of the gradients', and each of these."""
    results = step.run(step.prepare())
    found: dict[str, Any] = {}
    for name, got, truth in zip(("error_output", "error_gradient"), results, exact, strict=True):
        errors = [relative_error(*pair) for pair in zip(got, truth, strict=True)]
        if errors:
            found[name] = max(errors)
    if exact[1]:
        found["error_gradients"] = " ".join(map(_text, errors))
    return found


@torch.no_grad()
def relative_error(got: Tensor, exact: Tensor) -> float:
    """Returns ||got - exact|| / ||exact||, in float64 and in blocks of rows."""
    if got.numel() != exact.numel():
        raise ValueError(f"got a result of shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    got, exact = got.detach().reshape(exact.shape), exact.detach()
    if exact.dim() == 0:
        got, exact = got.reshape(1), exact.reshape(1)
    pairs = zip(got.split(8192), exact.split(8192), strict=True)
    squares = [((one.double() - truth).square().sum().item(), truth.square().sum().item()) for one, truth in pairs]
    return float((sum(error for error, _ in squares) / sum(norm for _, norm in squares)) ** 0.5)


def reason_of(error: BaseException) -> str:
    """Returns one line that says what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _line(row: dict[str, str]) -> str:
    """Returns a row for the eye: what, and its figures or the reason why there are none."""
    figures = [
        f"{row[name]} {unit}"
        for name, unit in (
            ("p50_ms", "ms"),
            ("fraction_of_floor", "of the floor"),
            ("peak_mib", "MiB"),
            ("error_output", "error of the output"),
            ("error_gradient", "of the gradient"),
        )
        if row[name]
    ]
    what = (f"{row['kernel']} {row['mode']}", row["shape"], f"{row['provider']} {row['setting']}")
    return " | ".join([*what, row["reason"] or ", ".join(figures)])


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
