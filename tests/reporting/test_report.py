"""Reports: nothing left out, figures as a person reads them, a picture that shows what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from megatron_cpt.cli.main import main
from megatron_cpt.errors import InputError
from megatron_cpt.reporting import bits_per_byte_picture, read_report, write_report
from megatron_cpt.reporting.picture import COLOURS

HISTORY = [
    {"step": 0, "language": "en", "bits_per_byte": 1.6},
    {"step": 0, "language": "ja", "bits_per_byte": 3.0},
    {"step": 50, "language": "ja", "bits_per_byte": 1.2},
    {"step": 50, "language": "en", "bits_per_byte": 1.65},
]


def complete_report() -> dict[str, Any]:
    return {
        "name": "tiny",
        "bits_per_byte": {
            "en": {"base": 1.5, "after_surgery": 1.6, "adapted": 1.65},
            "ja": {"base": 2.5, "after_surgery": 3.0, "adapted": 1.2},
        },
        "bytes_per_token": {"en": {"base": 3.0, "adapted": 3.0}, "ja": {"base": 1.5, "adapted": 4.5}},
        "logit_parity": {"max_abs_diff": 3.2e-6},
        "tokenizer": {
            "source_lines_changed": {"changed": 1, "total": 2000, "examples": ["a|b"]},
            "fast_slow_mismatches": 0,
        },
        "train": {
            "tokens": 1228800,
            "tokens_per_second": 21034.4,
            "bytes_per_second": 80211.2,
            "world_size": 2,
            "layout": "TP2-PP1-DP1",
        },
        "probe": {
            "ja": {
                stage: {"accuracy": accuracy, "standard_error": 0.027, "chance": 0.25, "questions": 1264}
                for stage, accuracy in (("base", 0.21), ("after_surgery", 0.25), ("adapted", 0.525))
            }
        },
        "extra": {"accuracy": {"base": 0.11, "adapted": 0.525}, "note": "a|b", "right": [1, 2]},
        "versions": {"torch": "2.13.0"},
        "config_hash": "c0ffee",
    }


def test_json_keeps_everything(tmp_path: Path) -> None:
    write_report(complete_report(), HISTORY, tmp_path / "run")
    assert read_report(tmp_path / "run") == {**complete_report(), "history": HISTORY}


def test_markdown_holds_the_figures_and_the_picture(tmp_path: Path) -> None:
    write_report(complete_report(), HISTORY, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for row in (
        "| ja | 2.5000 | 3.0000 | 1.2000 | -1.3000 |",
        "| ja | 1.500 | 4.500 | +200.0% |",
        "| max abs diff | 3.2e-06 |",
        "| source lines changed | 1 of 2,000 |",
        "| tokens | 1,228,800 |",
        "| bytes/s | 80,211 |",
        "| accuracy adapted | 0.525 |",
        "| asked in | base | after surgery | adapted | chance | questions |",
        "| ja | 0.210 +- 0.027 | 0.250 +- 0.027 | 0.525 +- 0.027 | 0.250 | 1,264 |",
        "| note | a\\|b |",
        "| config hash | c0ffee |",
    ):
        assert row in text.splitlines()
    assert f"]({next(tmp_path.glob('*.png')).name})" in text


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("bits_per_byte", "ja", "after_surgery"), "bits_per_byte.ja.after_surgery"),
        (("train", "bytes_per_second"), "train.bytes_per_second"),
        (("logit_parity",), "logit_parity"),
        (("config_hash",), "config_hash"),
    ],
)
def test_a_report_that_leaves_something_out_is_not_written(tmp_path: Path, path: tuple[str, ...], named: str) -> None:
    report = complete_report()
    section = report
    for key in path[:-1]:
        section = section[key]
    del section[path[-1]]
    with pytest.raises(ValueError, match=f"the report lacks {named}$"):
        write_report(report, HISTORY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected the output folder of a finished run"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="is not the report of a run"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("train", None, "lacks train;"),
        ("train", {"tokens": 1}, "lacks train.tokens_per_second, train.bytes_per_second, train.world_size"),
        ("bits_per_byte", {"ja": {"base": 1.0, "adapted": "1"}}, "lacks bits_per_byte.ja.after_surgery, bits_per_byte"),
        ("bytes_per_token", {"ja": 3.0}, "lacks bytes_per_token.ja.base, bytes_per_token.ja.adapted;"),
        ("history", [{"step": 1, "language": "ja"}], "lacks history.0.bits_per_byte;"),
    ],
)
def test_a_report_that_is_not_whole_is_wrong_input(
    section: str, value: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**complete_report(), section: value}))
    assert main(["report", str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'report.json'} {named}" in capsys.readouterr().err


def test_a_report_is_written_again_from_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(complete_report(), HISTORY, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for path in [tmp_path / "report.md", *tmp_path.glob("*.png")]:
        path.unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == text.strip() == (tmp_path / "report.md").read_text("utf-8").strip()
    assert list(tmp_path.glob("*.png"))
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_report(tmp_path) == {**complete_report(), "history": HISTORY}
    assert main(["report", str(tmp_path / "elsewhere")]) == 2


def pixels_of(path: Path, colour: str) -> np.ndarray:
    """(pixels, 2): row and column of every pixel of exactly this colour."""
    image = imread(path)[..., :3]
    return np.argwhere(np.abs(image - np.array(to_rgb(colour))).max(axis=2) < 0.02)


def test_picture_shows_each_language_and_its_base(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    bits_per_byte_picture(HISTORY, {"en": 1.5, "ja": 2.5}, path)
    height, width = imread(path).shape[:2]
    assert (width, height) == (1152, 648)
    for colour in COLOURS[:2]:
        rows, columns = pixels_of(path, colour).T
        assert len(rows) > 500
        assert columns.min() < 0.15 * width and columns.max() > 0.86 * width  # the line, and its label
    falling = pixels_of(path, COLOURS[1])
    line = falling[falling[:, 1] < 0.85 * width]
    left = line[line[:, 1] < 0.3 * width][:, 0].mean()
    right = line[line[:, 1] > 0.7 * width][:, 0].mean()
    assert left < right  # rows count downwards: bits per byte fell
    assert not list(tmp_path.glob(".*"))


def test_labels_do_not_cover_each_other(tmp_path: Path) -> None:
    languages = ["en", "ja", "de", "ko", "fr"]
    history = [
        {"step": step, "language": language, "bits_per_byte": 1.0 + (step == 0) * number}
        for number, language in enumerate(languages)
        for step in (0, 10)
    ]
    path = tmp_path / "picture.png"
    bits_per_byte_picture(history, {}, path)
    height, width = imread(path).shape[:2]
    spans = []
    for colour in COLOURS[: len(languages)]:
        rows, columns = pixels_of(path, colour).T
        label = rows[columns > 0.93 * width]
        spans.append((label.min(), label.max()))
    spans.sort()
    assert spans[-1][1] < 0.9 * height  # beside the axis, not below it
    assert all(above[1] < below[0] for above, below in zip(spans, spans[1:], strict=False))


def test_picture_of_a_run_without_history_shows_the_bases(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    bits_per_byte_picture([], {"en": 1.5, "ja": 2.5}, path)
    assert path.stat().st_size > 5000


def test_a_base_far_above_does_not_flatten_the_lines(tmp_path: Path) -> None:
    rows = {}
    for name, base in (("near", {"en": 1.5}), ("far", {"en": 1.5, "ja": 17.5})):
        bits_per_byte_picture(HISTORY, base, tmp_path / f"{name}.png")
        pixels = pixels_of(tmp_path / f"{name}.png", COLOURS[0])
        rows[name] = pixels[pixels[:, 1] < 0.7 * 1152][:, 0].mean()
    # The English line keeps the height that it has without the Japanese base.
    assert abs(rows["near"] - rows["far"]) < 0.02 * 648
