"""The pictures of a cleaning say what was counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from megatron_cpt.data.cleaning.plots import draw_plots


def test_what_is_kept_and_dropped_is_drawn_from_zero_and_unfilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a logarithmic axis a stack would show 10 dropped on 1,000 kept as nothing, and areas mean nothing."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    histogram = {"scale": "size", "edges": [0.0, 1.0, 10.0, 100.0], "kept": [0, 1000, 3], "dropped": [7, 10, 0]}
    rule = {"metric": "characters", "at_least": 1.0, "at_most": None, "broken": 7}
    assert draw_plots({"characters": histogram}, {"short": rule}, tmp_path / "plots") == ["sizes.png"]
    (axes,) = (axes for axes in drawn[0].axes if axes.get_visible())
    steps = {patch.get_label(): patch for patch in axes.patches if isinstance(patch, StepPatch)}
    for label, key in (("kept by the rules", "kept"), ("dropped by a rule", "dropped")):
        assert steps[label].get_data().values.tolist() == histogram[key] and steps[label].get_data().baseline == 0
        assert not steps[label].get_fill()
