"""Measures against SentencePiece counted by hand; the proof fails when the files do not agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from megatron_cpt.errors import TokenizerError, VerificationError
from megatron_cpt.tokenizer import (
    fast_slow_mismatches,
    load_tokenizer,
    measure,
    source_lines_changed,
    verify_tokenizer,
)


def test_measure(base: Path, english: list[str], japanese: list[str]) -> None:
    texts = [*english, *japanese, "", "🙂 mixed 静か"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    ids = [id for text in texts for id in reference.encode(text)]
    size = sum(len(text.encode()) for text in texts)
    expected = {
        "tokens": len(ids),
        "bytes": size,
        "bytes_per_token": size / len(ids),
        "byte_fallback_share": sum(map(reference.is_byte, ids)) / len(ids),
    }
    assert measure(load_tokenizer(base), texts) == expected
    assert measure(load_tokenizer(base / "tokenizer.json"), iter(texts)) == expected
    assert measure(load_tokenizer(base), []) == {**dict.fromkeys(expected, 0), "bytes_per_token": 0.0}


def test_lines_changed(base: Path, extended: Path, english: list[str], japanese: list[str]) -> None:
    old, new = load_tokenizer(base), load_tokenizer(extended)
    mixed = [line for pair in zip(english, japanese, strict=True) for line in pair]
    result = source_lines_changed(old, new, mixed)
    assert (result["changed"], result["total"]) == (400, 800)
    assert result["examples"] == japanese[:5]


def with_merges_by_id(folder: Path, copy: Path) -> Path:
    """The folder with the merge list ranked by id, as a conversion that never sees the scores ranks it."""
    shutil.copytree(folder, copy)
    value = json.loads((copy / "tokenizer.json").read_text())
    vocabulary, merges = value["model"]["vocab"], value["model"]["merges"]
    merges.sort(key=lambda merge: vocabulary[merge.replace(" ", "")])
    (copy / "tokenizer.json").write_text(json.dumps(value))
    return copy


def test_wrong_merges_are_found(with_runs: Path, tmp_path: Path, english: list[str]) -> None:
    assert fast_slow_mismatches(with_runs, english) == {"mismatches": 0, "total": 400, "examples": []}
    wrong = with_merges_by_id(with_runs, tmp_path / "wrong")
    lines = [*english, *(" " * length + "x" for length in range(40))]
    result = fast_slow_mismatches(wrong, lines)
    assert 0 < result["mismatches"] < result["total"] == 440
    assert set(result["examples"]) <= set(lines) and len(result["examples"]) == 5


def test_verify(extended: Path, tmp_path: Path, japanese: list[str]) -> None:
    result = verify_tokenizer(extended, japanese)
    assert result["mismatches"] == 0 and result["total"] > 400
    assert result["vocab_size"] == load_tokenizer(extended).vocab_size
    assert result["vocab_map"]["special"] == 3
    copy = tmp_path / "copy"
    shutil.copytree(extended, copy)
    (copy / "tokenizer.json").write_text((extended / "tokenizer.json").read_text() + " ")
    with pytest.raises(VerificationError, match="tokenizer.json is not the file"):
        verify_tokenizer(copy, [])
    (copy / "manifest.json").unlink()
    with pytest.raises(TokenizerError, match="unfinished"):
        verify_tokenizer(copy, [])


def test_verify_compares_the_files(extended: Path, base: Path, tmp_path: Path) -> None:
    """Files that carry the right hashes and still disagree."""
    copy = tmp_path / "copy"
    shutil.copytree(extended, copy)
    value = json.loads((copy / "tokenizer.json").read_text())
    value["normalizer"] = value["normalizer"]["normalizers"][1]
    (copy / "tokenizer.json").write_text(json.dumps(value))
    record_hash(copy, "tokenizer.json")
    with pytest.raises(VerificationError, match="differ on"):
        verify_tokenizer(copy, [])
    shutil.copy(base / "tokenizer.json", copy)
    shutil.copy(base / "tokenizer.model", copy)
    record_hash(copy, "tokenizer.json")
    record_hash(copy, "tokenizer.model")
    with pytest.raises(VerificationError, match="another vocabulary"):
        verify_tokenizer(copy, [])


def record_hash(folder: Path, name: str) -> None:
    from megatron_cpt.config.manifest import sha256_file

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"][name] = sha256_file(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_incomplete_folder(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "tokenizer.model", tmp_path)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        fast_slow_mismatches(tmp_path, ["text"])
