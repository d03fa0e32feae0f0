"""The verb `surgery` from end to end, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.checkpoint import open_hf
from megatron_cpt.cli.main import main
from megatron_cpt.tokenizer import load_tokenizer


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Output of a command that has to end well, from its JSON."""
    capsys.readouterr()
    assert main(["surgery", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_show_apply(
    old_tokenizer: Path,
    new_tokenizer: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, made = tmp_path / "plan", tmp_path / "made"
    words = ["--old-tokenizer", old_tokenizer, "--new-tokenizer", new_tokenizer, "--output", plan]
    run(capsys, "plan", *words, "--dry-run")
    assert not plan.exists()
    facts = run(capsys, "plan", *words, "--method", "mean")
    for mode in (["--dry-run"], []):
        assert main(["surgery", "plan", *map(str, words), *mode]) == 2
        assert f"{plan} already holds files" in capsys.readouterr().err
    shown = run(capsys, "show", plan)
    assert facts == {"output": str(plan), **{name: fact for name, fact in shown.items() if name != "plan_sha256"}}
    assert run(capsys, "show", plan, "--row", 5)["head"] == {"old_ids": [5], "weights": [1.0]}
    assert main(["surgery", "show", str(plan)]) == 0
    assert "rows new" in capsys.readouterr().out

    # The plan holds the new tokenizer, so the base model is all that is needed beside it.
    source = make_model(load_tokenizer(old_tokenizer).vocab_size)
    written = run(capsys, "apply", plan, source, made)
    assert written["new_size"] == open_hf(made).vocab_size == load_tokenizer(made).vocab_size
    assert written["plan_sha256"] == shown["plan_sha256"]
    padded = run(capsys, "apply", plan, source, tmp_path / "padded", "--divisor", 64)["padded_vocab_size"]
    assert padded % 64 == 0 and open_hf(tmp_path / "padded").vocab_size == padded > written["new_size"]
    run(capsys, "undo", plan, made, tmp_path / "back", "--tokenizer", old_tokenizer)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_exit_codes(
    old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, output = str(old_tokenizer), str(new_tokenizer), str(tmp_path / "plan")
    wrong = [
        ["plan", "--old-tokenizer", new, "--new-tokenizer", new, "--output", output],
        ["plan", "--old-tokenizer", old, "--new-tokenizer", old, "--output", output],
        ["plan", "--old-tokenizer", old, "--new-tokenizer", new, "--output", output, "--method", "magic"],
        ["show", output],
        ["apply", output, output, output],
        ["undo", output, output, output],
    ]
    for words in wrong:
        assert main(["surgery", *words]) == 2
        assert capsys.readouterr().err.startswith("error:")
    assert list(tmp_path.iterdir()) == []


def test_methods_that_read_text(
    old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.jsonl"
    one.write_text("the river runs past a quiet town\n\n" * 12)
    two.write_text("".join(json.dumps({"body": "静かな川が町を流れて the river town\n"}) + "\n" for _ in range(12)))
    words = ["--old-tokenizer", old_tokenizer, "--new-tokenizer", new_tokenizer, "--output", tmp_path / "plan"]
    sizes = ["--set", "min_count=3", "--set", "dimension=2", "--text-field", "body", "--dry-run"]
    for method, corpora in (
        ("aligned", [f"target_corpus={two}"]),
        ("focus", [f"target_corpus=[{one}, {two}]", "target_only=true"]),
        ("focus", [f"source_corpus=[{one}]", f"target_corpus={two}"]),
        ("wechsel", [f"source_corpus={one}", f"target_corpus=[{two}]"]),
    ):
        given = [word for corpus in corpora for word in ("--set", corpus)]
        facts = run(capsys, "plan", *words, "--method", method, *given, *(sizes if method != "aligned" else sizes[4:]))
        made = facts["methods"]["head"]
        assert made["fallback_rows"] < facts["rows"]["new"]
        assert made["target_corpus"]["texts"] == (24 if "target_only=true" in corpora else 12)
        assert main(["surgery", "plan", *map(str, words), "--method", method]) == 2
        assert "_corpus=FILE, or [FILE, FILE]" in capsys.readouterr().err
