"""A comparison's figures from curves that are known, and what is written of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.reporting.comparison import report_of, write_comparison


def run(start: float, drop: float, steps: range, *, before: float | None = None) -> dict[str, Any]:
    """A curve that falls by `drop` with each step in ja, and stands still in en."""
    history = [{"step": step, "language": "en", "bits_per_byte": 2.0} for step in steps]
    history += [{"step": step, "language": "ja", "bits_per_byte": start - drop * step} for step in steps]
    found: dict[str, Any] = {"history": history, "bytes": 1000}
    if before is not None:
        found["certificate"] = {"bits_per_byte": {"en": {"before": 1.9}, "ja": {"before": before}}}
    return found


def facts(**changes: Any) -> dict[str, Any]:
    arms = {
        "slow": {
            "begins_with": "random weights",
            "steps_of_calibration": 0,
            "runs": {"1": run(5.0, 0.01, range(0, 101, 25)), "2": run(5.2, 0.01, range(0, 101, 25))},
        },
        "fast": {
            "begins_with": "both mean",
            "steps_of_calibration": 10,
            "runs": {
                "1": run(4.5, 0.02, range(0, 91, 30), before=9.0),
                "2": run(4.6, 0.02, range(0, 91, 30), before=9.0),
            },
        },
    }
    return {
        "name": "two",
        "languages": {"source": "en", "target": "ja"},
        "seeds": [1, 2, 3],
        "controls": ["slow"],
        "train_steps": 100,
        "eval_interval_steps": 25,
        "tokens_per_step": 1024,
        "arms": arms,
        "failed": {},
        "versions": {},
        "config_hash": "0" * 64,
        **changes,
    }


def test_figures() -> None:
    report = report_of(facts())
    assert report["columns"] == [0, 25, 50, 100]
    slow, fast = report["arms"]["slow"], report["arms"]["fast"]
    assert [slow["bits_per_byte"]["ja"][key]["mean"] for key in ("0", "25", "50", "100")] == pytest.approx(
        [5.1, 4.85, 4.6, 4.1]
    )
    # Calibration has read the tokens of ten steps: after 25 steps it has trained for 15.
    assert fast["bits_per_byte"]["ja"]["0"]["mean"] == pytest.approx(4.55)
    assert fast["bits_per_byte"]["ja"]["25"]["values"] == pytest.approx([4.5 - 0.3, 4.6 - 0.3])
    assert report["base"]["ja"]["mean"] == 9.0
    against = fast["against"]["slow"]
    assert against["difference"]["ja"]["values"] == pytest.approx([2.7 - 4.0, 2.8 - 4.2])
    assert against["difference"]["en"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "values": [0.0, 0.0]}
    assert against["reaches"]["steps"]["values"] == pytest.approx([10 + 25, 10 + 20])
    assert against["reaches"]["share"]["mean"] == pytest.approx(0.325)
    assert slow["against"] == {}


def test_a_level_that_is_not_reached_and_a_seed_that_is_missing() -> None:
    turned = facts(controls=["fast"])
    del turned["arms"]["slow"]["runs"]["2"]
    reaches = report_of(turned)["arms"]["slow"]["against"]["fast"]["reaches"]
    assert reaches == {"seeds": 1, "reached": 0, "steps": None, "share": None}
    turned["arms"]["slow"]["runs"].clear()
    assert report_of(turned)["arms"]["slow"]["against"]["fast"] == {}


def test_what_is_written(tmp_path: Path) -> None:
    given = facts(failed={"seed 3, slow": "the loss of step 7 is nan"})
    report = write_comparison(given, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "comparison.md").read_text()
    assert "| slow | 5.1000 +- 1.2706 | 4.8500 +- 1.2706 |" in page
    assert "seeds 1, 2 of 3" in page and "the loss of step 7 is nan" in page
    assert "| (base, before surgery) | 9.0000 +- 0.0000 | - |" in page
    with open(tmp_path / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5 + 2 * 2 * 4
    assert {"arm": "fast", "seed": "1", "language": "ja", "step": "40", "bits_per_byte": str(4.5 - 0.02 * 30)} in rows
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
