"""Figures of curves against numbers known by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_cpt.reporting.curves import first_at, mean_with_interval, t_quantile, value_at

FALLING = [(0, 4.0), (25, 3.0), (50, 2.5), (100, 2.5), (150, 2.0)]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_of_printed_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Three draws at a time, as many seeds as a comparison has by default."""
    draws = np.random.default_rng(1).normal(2.5, 0.1, (4000, 3))
    found = [mean_with_interval(row.tolist()) for row in draws]
    share = sum(each["low"] <= 2.5 <= each["high"] for each in found) / len(found)
    assert share == pytest.approx(0.95, abs=0.012)


def test_interval_of_few_values() -> None:
    assert mean_with_interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "values": [2.0]}
    found = mean_with_interval([1.0, 2.0, 3.0])
    assert found["high"] - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_values_between_points() -> None:
    assert [value_at(FALLING, step) for step in (0, 10, 25, 75, 150)] == [4.0, 3.6, 3.0, 2.5, 2.0]
    assert value_at(FALLING, 151) is None and value_at(FALLING[1:], 10) is None and value_at([], 0) is None
    assert value_at([(7, 3.0)], 7) == 3.0


def test_the_first_step_at_a_level() -> None:
    assert first_at(FALLING, 3.5) == 12.5
    assert first_at(FALLING, 2.5) == 50
    assert first_at(FALLING, 2.25) == 125
    assert first_at(FALLING, 1.9) is None
    assert first_at(FALLING, 4.5) == 0
    assert first_at([(0, 3.0), (10, 2.0), (20, 2.9)], 2.5) == 5, "a curve that rises again has been there"
