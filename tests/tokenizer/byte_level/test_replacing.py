"""Replacing a byte-level vocabulary: shared pieces keep their ids, texts are cut as the training says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import VocabMap, load_tokenizer, map_vocabularies
from megatron_cpt.tokenizer.byte_level import replace_byte_level, train_byte_level

from .conftest import HARD, SPECIALS


@pytest.mark.parametrize("size", [407, 600])
def test_shared_pieces_keep_their_ids(
    llama3: Path, english: list[str], japanese: list[str], tmp_path: Path, size: int
) -> None:
    report = replace_byte_level(llama3, [*english, *japanese], size, 1, tmp_path / "new", "en,ja")
    old, new = load_tokenizer(llama3), load_tokenizer(tmp_path / "new")
    assert (report.old_size, report.new_size, new.vocab_size) == (407, size, size)
    ids = {old.piece(id): id for id in range(407)}
    shared = [id for id in range(size) if new.piece(id) in ids]
    assert all(ids[new.piece(id)] == id for id in shared)
    assert len(shared) == report.num_kept + report.num_shared
    assert report.num_kept == 256 + 7 and report.num_shared > 0 and report.num_moved == 0
    assert report.num_new == size - len(shared) > 0
    assert [new.piece(id) for id in range(400, 407)] == list(SPECIALS)
    assert VocabMap.load(tmp_path / "new") == map_vocabularies(old, new)
    # The cut is that of a tokenizer trained alone.
    train_byte_level([*english, *japanese], size, tmp_path / "alone", specials=SPECIALS)
    alone = load_tokenizer(tmp_path / "alone")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "new"))
    for text in (*english[:100], *japanese[:100], *HARD[:-1]):
        assert list(map(new.piece, new.encode(text))) == list(map(alone.piece, alone.encode(text)))
        assert theirs(text, add_special_tokens=False)["input_ids"] == new.encode(text)
        assert new.decode(new.encode(text)) == text


def test_a_smaller_vocabulary(llama3: Path, english: list[str], tmp_path: Path) -> None:
    """Specials in front: then a size below the base's leaves pieces without their old place."""
    base = tmp_path / "base"
    base.mkdir()
    value = json.loads((llama3 / "tokenizer.json").read_text())
    moved = {piece: (id + 7) % 407 for piece, id in value["model"]["vocab"].items()}
    moved |= {token: number for number, token in enumerate(SPECIALS)}
    value["model"]["vocab"] = dict(sorted(moved.items(), key=lambda item: item[1]))
    for token in value["added_tokens"]:
        token["id"] = moved[token["content"]]
    template = value["post_processor"]["processors"][1]["special_tokens"]
    template[SPECIALS[0]]["ids"] = [0]
    (base / "tokenizer.json").write_text(json.dumps(value))
    report = replace_byte_level(base, english[::2], 320, 8, tmp_path / "small")
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "small")
    assert new.vocab_size == report.new_size == 320
    ids = {old.piece(id): id for id in range(407)}
    for id in range(320):
        assert ids.get(new.piece(id), 320) in (id, *range(320, 407))
    assert report.num_moved == sum(ids.get(new.piece(id), 0) >= 320 for id in range(320))
    assert report.num_kept + report.num_shared + report.num_moved + report.num_new == 320
    assert [new.piece(id) for id in range(7)] == list(SPECIALS)


def test_a_text_that_offers_too_little(llama3: Path, english: list[str], tmp_path: Path) -> None:
    report = replace_byte_level(llama3, [*english], 3000, 8, tmp_path / "new")
    assert report.new_size < 3000 and report.new_size % 8 == 0
    assert sorted(load_tokenizer(tmp_path / "new").backend.get_vocab().values()) == list(range(report.new_size))  # type: ignore[attr-defined]
    with pytest.raises(TokenizerError, match="give more text"):
        replace_byte_level(llama3, ["a b"], 416, 8, tmp_path / "other")


def test_refused(base: Path, llama3: Path, english: list[str], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not byte-level"):
        replace_byte_level(base, english, 416, 8, tmp_path / "out")
    with pytest.raises(TokenizerError, match="multiple of the divisor 8"):
        replace_byte_level(llama3, english, 410, 8, tmp_path / "out")
    with pytest.raises(TokenizerError, match="at least 407"):
        replace_byte_level(llama3, english, 400, 8, tmp_path / "out")
    assert not (tmp_path / "out").exists()
