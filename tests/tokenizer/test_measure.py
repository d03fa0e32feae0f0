"""Measures against SentencePiece counted by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sentencepiece

from megatron_cpt.tokenizer import load_tokenizer, measure, source_lines_changed


def test_measure(base: Path, english: list[str], japanese: list[str]) -> None:
    texts = [*english, *japanese, "", "\U0001f642 mixed 静か", "\n".join(english[:20]), "a\r\nb"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    pieces = [piece for text in texts for piece in reference.encode(text, out_type=str)]
    size = sum(len(text.encode()) for text in texts)
    line_ends = sum(piece in ("<0x0A>", "<0x0D>") for piece in pieces)
    expected = {
        "tokens": len(pieces),
        "bytes": size,
        "bytes_per_token": size / len(pieces),
        "tokens_per_character": len(pieces) / sum(map(len, texts)),
        "fertility": None,
        "byte_fallback_share": (sum(piece.startswith("<0x") for piece in pieces) - line_ends) / len(pieces),
        "line_end_share": line_ends / len(pieces),
    }
    assert line_ends == 21
    assert measure(load_tokenizer(base), texts) == pytest.approx(expected)
    assert measure(load_tokenizer(base / "tokenizer.json"), iter(texts)) == pytest.approx(expected)
    assert set(measure(load_tokenizer(base), []).values()) == {0}


def test_fertility_is_of_scripts_with_words(base: Path, english: list[str], japanese: list[str]) -> None:
    tokenizer = load_tokenizer(base)
    found = measure(tokenizer, english)
    assert found["fertility"] == found["tokens"] / sum(len(re.findall(r"\S+", line)) for line in english)
    assert measure(tokenizer, japanese)["fertility"] is None
    assert measure(tokenizer, [*english, *japanese[:20]])["fertility"] is not None


def test_lines_changed(base: Path, extended: Path, english: list[str], japanese: list[str]) -> None:
    old, new = load_tokenizer(base), load_tokenizer(extended)
    mixed = [line for pair in zip(english, japanese, strict=True) for line in pair]
    result = source_lines_changed(old, new, mixed)
    assert (result["changed"], result["total"]) == (400, 800)
    assert [example["text"] for example in result["examples"]] == japanese[:5]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(extended / "tokenizer.model"))
    assert [example["new"] for example in result["examples"]] == [
        reference.encode(line, out_type=str) for line in japanese[:5]
    ]
