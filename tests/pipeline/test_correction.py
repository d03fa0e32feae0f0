"""A run that was refused before it made anything may be corrected in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.cli.main import main


def write_corpus(path: Path, last_line: str = "") -> Path:
    lines = [json.dumps({"id": f"work{number}", "text": f"text number {number}"}) + "\n" for number in range(40)]
    path.write_text("".join(lines) + last_line)
    return path


def test_wrong_text_can_be_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_corpus(tmp_path / "good.jsonl")
    for name in ("first", "second"):  # the second call differs, and is refused for its own fault alone
        broken = write_corpus(tmp_path / f"{name}.jsonl", '{"text": "cut\n')
        texts = ("--set", f"data.source={good}", "--set", f"data.target={broken}")
        assert main(["run", "real-text", *texts, "--set", f"output={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert f"{name}.jsonl:41" in error and "another run" not in error
