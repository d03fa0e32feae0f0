"""Output for people and for programs, and progress where nobody sees a bar."""

from __future__ import annotations

import json
import sys
import time

import pytest
from rich.text import Text

from megatron_cpt.cli.console import emit, progress


def test_emit_prints_json_or_what_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"language": "日本語", "bits": 1.5}
    emit(value, True, lambda _: "unused")
    assert json.loads(capsys.readouterr().out) == value
    emit(value, False, lambda it: Text(f"{it['language']} [x] {'-' * 150}"))
    assert capsys.readouterr().out.splitlines() == [f"日本語 [x] {'-' * 150}"]


def test_progress_in_a_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("Counting") as advance:
        for done in range(11):
            advance(done, 10)
            now[0] += 10
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Counting: 30 %, 70 s left",
        "Counting: 60 %, 40 s left",
        "Counting: 90 %, 10 s left",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress("Counting") as advance:
        advance(10, 10)
        advance(5, 10, "Joining")
    shown = capsys.readouterr().err
    assert "100%" in shown and "Joining" in shown and " 50%" in shown


def test_the_time_left_of_a_further_step_counts_from_its_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("Counting") as advance:
        now[0] += 500
        advance(10, 10)
        advance(0, 100, "Joining")
        now[0] += 40
        advance(40, 100, "Joining")
    assert capsys.readouterr().err.splitlines() == ["Counting: 100 %, 0 s left", "Joining: 40 %, 60 s left"]
