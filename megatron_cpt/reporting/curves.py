"""Curves over training steps: their value at a step, when they reach a level, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Curve = Sequence[tuple[float, float]]  # (step, value), steps ascending
LEVEL = 0.95


def value_at(curve: Curve, step: float) -> float | None:
    """The value at a step, on the line between the points around it; None outside the curve."""
    for (left, low), (right, high) in zip(curve, curve[1:], strict=False):
        if left <= step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return curve[0][1] if curve and step == curve[0][0] else None


def first_at(curve: Curve, level: float) -> float | None:
    """The first step at which the value is at most `level`, on the line between two points; None: never."""
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= level:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - level) / (before[1] - value)
        before = (step, value)
    return None


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean with its 95 % interval by Student's t over the values; of one value no interval is known.

    mean +- t(0.975; n - 1) s / sqrt(n), s the sample's standard deviation.

    Returns:
        `mean`, `low`, `high` (None where n = 1), `values`.
    """
    mean = statistics.fmean(values)
    low = high = None
    if len(values) > 1:
        half = t_quantile((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, for a probability above a half; by bisection.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, P(|T| <= t) as a finite sum.
    """
    wanted, low, high = 2 * probability - 1, 0.0, 1.0
    while _within(high, freedom) < wanted:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < wanted else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2 == 0:
        term = total = 1.0
        for k in range(2, freedom, 2):
            term *= (k - 1) / k * cosine * cosine
            total += term
        return sine * total
    total, term = 0.0, cosine
    for k in range(1, freedom, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    return 2 / math.pi * (angle + sine * total)
