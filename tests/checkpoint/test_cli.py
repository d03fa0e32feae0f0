"""`megatron-cpt checkpoint` from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Exit code, JSON of stdout (or its text) and stderr."""
    code = main(["checkpoint", *map(str, words)])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if "--json" in words else printed.out, printed.err


def test_convert_verify_and_show(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, stored = make_model(tmp_path / "hf"), tmp_path / "stored"
    words = ["convert", source, stored, "--to", "torch_dist", "--vocab-divisor", 16, "--dtype", "bfloat16", "--json"]
    code, planned, _ = run(capsys, *words, "--dry-run")
    assert code == 0 and planned["padded_vocab_size"] == 144 and not stored.exists()
    code, facts, _ = run(capsys, *words)
    assert code == 0 and facts["padded_vocab_size"] == 144 and facts["bytes"] == planned["bytes"]
    code, proof, _ = run(capsys, "verify", source, stored, "--json")
    assert code == 0 and proof["equal"] and proof["cast"] == "bfloat16" and proof["padding_rows"] == 11
    code, text, _ = run(capsys, "show", stored)
    assert code == 0 and "shape.num_layers" in text and "torch_dist" in text
    code, _, _ = run(capsys, "convert", stored, tmp_path / "back", "--to", "hf", "--bos", 4, "--json")
    assert code == 0 and json.loads((tmp_path / "back" / "config.json").read_text())["bos_token_id"] == 4
    code, _, error = run(capsys, "verify", source, tmp_path / "back")
    assert code == 1 and "manifest states no such cast" in error


def test_wrong_input_is_answered_with_code_2(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_model(tmp_path / "hf")
    for words, message in (
        (("show", tmp_path / "nothing"), "does not exist"),
        (("show", tmp_path), "neither config.json"),
        (("show", source / "config.json"), "is a file"),
        (("convert", source, source, "--to", "torch_dist"), "already holds files"),
        (("convert", source, tmp_path / "out", "--to", "zip"), "'hf', 'torch_dist'"),
        (("convert", source, tmp_path / "out", "--to", "torch_dist", "--tokenizer", tmp_path), "holds neither"),
    ):
        code, _, error = run(capsys, *words)
        assert code == 2 and message in error
    assert not (tmp_path / "out").exists()
