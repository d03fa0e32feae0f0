"""Training a byte-level tokenizer as Llama 3's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.byte_level import train_byte_level

from .conftest import HARD, SPECIALS


def test_what_is_made(llama3: Path, english: list[str], japanese: list[str]) -> None:
    tokenizer = load_tokenizer(llama3)
    assert tokenizer.vocab_size == 407
    assert [tokenizer.piece(id) for id in range(400, 407)] == list(SPECIALS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (400, 401, None)
    for text in (*english[:50], *japanese[:50], *HARD):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(map(len, map(tokenizer.encode, english))) < max(map(len, english))


def test_transformers_reads_the_same(llama3: Path, english: list[str], japanese: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(str(llama3))
    ours, library = load_tokenizer(llama3), tokenizers.Tokenizer.from_file(str(llama3 / "tokenizer.json"))
    for text in (*english, *japanese[:50], *HARD[:-1]):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [400, *ids] == library.encode(text).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs("a<|end_of_text|>b", add_special_tokens=False)["input_ids"][1] == 401
    assert (theirs.bos_token_id, theirs.eos_token_id) == (400, 401)


def test_words_are_those_of_llama_3(llama3: Path) -> None:
    words = tokenizers.Tokenizer.from_file(str(llama3 / "tokenizer.json")).pre_tokenizer
    cut = [piece for piece, _ in words.pre_tokenize_str("He's at12345 (x)\n\n  y")]
    assert cut == ["He", "'s", "\u0120at", "123", "45", "\u0120(", "x", ")\u010a\u010a", "\u0120", "\u0120y"]


def test_the_same_text_gives_the_same_bytes(llama3: Path, english: list[str], tmp_path: Path) -> None:
    train_byte_level(iter(english), 407, tmp_path / "again", specials=SPECIALS, language="en")
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (llama3 / name).read_bytes()
    assert json.loads((llama3 / "tokenizer.json").read_text())["model"]["ignore_merges"] is True


def test_refused(english: list[str], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is empty"):
        train_byte_level(["", "\n"], 400, tmp_path / "a")
    with pytest.raises(TokenizerError, match="expected at least the 258"):
        train_byte_level(english, 257, tmp_path / "a")
    with pytest.raises(TokenizerError, match="special tokens"):
        train_byte_level(english, 400, tmp_path / "a", specials=["<s>"])
    with pytest.raises(TokenizerError, match="surrogate"):
        train_byte_level(["a\ud800"], 400, tmp_path / "a")
    assert not (tmp_path / "a").exists()
