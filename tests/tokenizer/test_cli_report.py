"""`tokenizer report`, `verify` and `convert`, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.tokenizer.verify import HARD_TEXTS


@pytest.fixture
def files(tmp_path: Path, english: list[str], japanese: list[str]) -> dict[str, Path]:
    """A text of each language."""
    written = {"en": tmp_path / "en.txt", "ja": tmp_path / "ja.txt"}
    for path, lines in zip(written.values(), (english, japanese), strict=True):
        path.write_text("\n\n".join(lines), encoding="utf-8")
    return written


def wrong_prefix(folder: Path, copy: Path) -> Path:
    """The two files of a folder, its tokenizer.json putting no space before a text."""
    copy.mkdir()
    shutil.copy(folder / "tokenizer.model", copy)
    value = json.loads((folder / "tokenizer.json").read_text())
    value["normalizer"] = value["normalizer"]["normalizers"][1]
    (copy / "tokenizer.json").write_text(json.dumps(value))
    return copy


def test_report(files: dict[str, Path], base: Path, extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = files["en"].parent / "page"
    words = [
        "tokenizer",
        "report",
        str(extended),
        "--base",
        str(base),
        "--text",
        f"en={files['en']}",
        f"ja={files['ja']}",
    ]
    assert main([*words, "--tp", "1,3", "--output", str(page), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert json.loads((page / "report.json").read_text()) == {k: v for k, v in value.items() if k != "report"}
    assert value["languages"]["en"]["lines_changed"]["changed"] == 0
    assert value["languages"]["ja"]["lines_changed"]["changed"] == 400
    assert [fit["tensor_model_parallel_size"] for fit in value["costs"]["tensor_parallel"]] == [1, 3]
    assert sorted(value["costs"]["models"]) == ["Llama 2 70B", "Llama 2 7B"]
    text = (page / "report.md").read_text()
    for picture in ("bytes_per_token", "coverage", "piece_lengths"):
        assert f"plots/{picture}.png" in text and (page / "plots" / f"{picture}.png").stat().st_size > 5000
    assert main([*words, "--tp", "1,x"]) == 2
    assert "--tp" in capsys.readouterr().err


def test_verify(files: dict[str, Path], extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer", "verify", str(extended), "--text", str(files["en"]), str(files["ja"]), "--json"]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["total"] == 800 + len(HARD_TEXTS) and value["details"] == [] and value["mismatches"] == 0
    names = list(value["readers"])
    assert names[:2] == ["tokenizer.json", "megatron_cpt.data"] and names[2].startswith("transformers ")
    assert main([*words, "--against", "none", "--documents"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"transformers": "not asked for"}
    assert main([*words, "--against", "NoSuchTokenizer"]) == 2
    assert "has no tokenizer class" in capsys.readouterr().err


def test_mismatches_are_shown_and_repaired(
    files: dict[str, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, listed = wrong_prefix(base, tmp_path / "stranger"), tmp_path / "differences.jsonl"
    words = ["tokenizer", "verify", str(folder), "--against", "none", "--text", str(files["en"])]
    assert main([*words, "--show", "3", "--output", str(listed)]) == 1
    out, err = capsys.readouterr()
    assert out.count("tokenizer.json: '") == 3 and "none of this tool" in out and "expected \u2581" in out
    assert "tokenizer convert" in err and str(listed) in err
    found: list[dict[str, Any]] = [json.loads(line) for line in listed.read_text().splitlines()]
    assert main([*words, "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["details"] == found and len(found) == value["readers"]["tokenizer.json"] > 300

    assert main(["tokenizer", "convert", str(folder), "--output", str(tmp_path / "right"), "--json"]) == 0
    assert main(["tokenizer", "verify", str(tmp_path / "right"), "--text", str(files["en"])]) == 0
