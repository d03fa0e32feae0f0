"""Extending a byte-level tokenizer: nothing of the source changes, every new piece lives, all readers agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer, map_vocabularies
from megatron_cpt.tokenizer.byte_alphabet import written
from megatron_cpt.tokenizer.byte_level import extend_byte_level

from .conftest import HARD, SPECIALS


def test_source_lines_are_cut_as_before(llama3: Path, extended3: Path, english: list[str], korean: list[str]) -> None:
    old, new = load_tokenizer(llama3), load_tokenizer(extended3)
    lines = [*english, *korean, *HARD, "".join(map(chr, range(0x80, 0x3000, 7)))]
    assert new.encode_batch(lines) == old.encode_batch(lines)


def test_japanese_takes_fewer_tokens(llama3: Path, extended3: Path, japanese: list[str]) -> None:
    old, new = load_tokenizer(llama3), load_tokenizer(extended3)
    before, after = (sum(map(len, tokenizer.encode_batch(japanese))) for tokenizer in (old, new))
    assert after < before / 6
    for text in (*japanese, "\u5e73\u4eee\u540d\u3068 mixed \u6f22\u5b57 123\u3002\n"):
        assert new.decode(new.encode(text)) == text


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_no_piece_is_dead(extended3: Path, ignore_merges: bool) -> None:
    """Every new piece comes out when its own bytes are merged, without the look-up of whole words."""
    value = json.loads((extended3 / "tokenizer.json").read_text())
    value["model"]["ignore_merges"] = ignore_merges
    model = tokenizers.Tokenizer.from_str(json.dumps(value)).model
    tokenizer = load_tokenizer(extended3)
    new = range(407, tokenizer.vocab_size)
    assert len(new) > 100
    for id in new:
        assert [token.id for token in model.tokenize(tokenizer.piece(id))] == [id]
        assert tokenizer.encode_bytes(tokenizer.piece_bytes(id) or b"") == [id]


def test_transformers_gives_the_same_ids(
    extended3: Path, english: list[str], japanese: list[str], korean: list[str]
) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(str(extended3)), load_tokenizer(extended3)
    library = tokenizers.Tokenizer.from_file(str(extended3 / "tokenizer.json"))
    lines = [*english[:100], *japanese, *korean[:50], *HARD[:-1]]
    assert theirs(lines, add_special_tokens=False)["input_ids"] == ours.encode_batch(lines)
    assert [encoding.ids for encoding in library.encode_batch(lines, add_special_tokens=False)] == ours.encode_batch(
        lines
    )
    assert [theirs.decode(ids) for ids in ours.encode_batch(lines)] == lines


def test_ids_and_files(llama3: Path, extended3: Path, japanese: list[str], tmp_path: Path) -> None:
    old, new = load_tokenizer(llama3), load_tokenizer(extended3)
    assert new.vocab_size % 16 == 0 and 407 + 150 < new.vocab_size <= 407 + 200
    assert [new.piece(id) for id in range(407)] == [old.piece(id) for id in range(407)]
    assert [new.kind(id) for id in range(407)] == [old.kind(id) for id in range(407)]
    assert (new.bos_id, new.eos_id) == (400, 401)
    for token in SPECIALS:
        assert new.encode(token) == old.encode(token), "the spelling of a special token is text"
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (llama3, extended3))
    rows = [" ".join(merge) for merge in before["model"]["merges"]]
    assert after["model"]["merges"][: len(rows)] == rows
    for part in ("pre_tokenizer", "decoder", "post_processor", "added_tokens"):
        assert after[part] == before[part]
    extend_byte_level(llama3, japanese, 200, "ja", 16, tmp_path / "again", "ja")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab_map.json", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (extended3 / name).read_bytes()


def test_map(llama3: Path, extended3: Path) -> None:
    old, new = load_tokenizer(llama3), load_tokenizer(extended3)
    vocab_map = VocabMap.load(extended3)
    assert vocab_map == map_vocabularies(old, new)
    assert vocab_map.counts()["special"] == 7 and vocab_map.counts()["byte"] == 256
    assert [entry.old_id for entry in vocab_map.entries[:407]] == list(range(407))
    for id in range(407, new.vocab_size):
        pieces = vocab_map.entries[id].old_pieces
        assert vocab_map.entries[id] == Entry("new", None, pieces)
        assert b"".join(old.piece_bytes(piece) or b"?" for piece in pieces) == new.piece_bytes(id)


def test_report(llama3: Path, japanese: list[str], tmp_path: Path) -> None:
    report = extend_byte_level(llama3, japanese, 40, "ja", 1, tmp_path / "few")
    assert (report.old_size, report.new_size, report.num_new, report.requested) == (407, 447, 40, 40)
    assert report.dropped == {"unreachable": 0, "divisor": 0}
    assert report.num_merges >= 40
    assert (report.lines, report.text_bytes) == (400, sum(len(line.encode()) for line in japanese))
    tokenizer = load_tokenizer(tmp_path / "few")
    used = {id for ids in tokenizer.encode_batch(japanese) for id in ids}
    assert report.num_inner == len(set(range(407, 447)) - used) > 0


def test_without_a_script_source_lines_change(
    llama3: Path, english: list[str], japanese: list[str], tmp_path: Path
) -> None:
    """What the filter is for: without it the same texts merge pieces of English too."""
    mixed = [line + text for line, text in zip(english, japanese, strict=True)]
    lines = english[1::10]
    for script, same in (("ja", True), ("any", False)):
        report = extend_byte_level(llama3, mixed, 300, script, 1, tmp_path / script)
        assert report.dropped["unreachable"] == 0
        old, new = load_tokenizer(llama3), load_tokenizer(tmp_path / script)
        assert (new.encode_batch(lines) == old.encode_batch(lines)) is same


def test_an_extension_is_extended(extended3: Path, korean: list[str], japanese: list[str], tmp_path: Path) -> None:
    old = load_tokenizer(extended3)
    report = extend_byte_level(extended3, korean, 60, "ko", 1, tmp_path / "both")
    new = load_tokenizer(tmp_path / "both")
    assert report.new_size == old.vocab_size + 60
    assert new.encode_batch([*japanese, *HARD[:-3]]) == old.encode_batch([*japanese, *HARD[:-3]])
    assert sum(map(len, new.encode_batch(korean))) < sum(map(len, old.encode_batch(korean))) / 2


def test_specials_outside_of_the_vocabulary(llama3: Path, japanese: list[str], tmp_path: Path) -> None:
    """Llama 3's own file has its specials as added tokens alone, which the library would count anew."""
    base = tmp_path / "base"
    shutil.copytree(llama3, base)
    value = json.loads((base / "tokenizer.json").read_text())
    for token in SPECIALS:
        value["model"]["vocab"].pop(token, None)
    (base / "tokenizer.json").write_text(json.dumps(value))
    assert load_tokenizer(base).vocab_size == 407
    extend_byte_level(base, japanese, 40, "ja", 1, tmp_path / "made")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert [library.token_to_id(token) for token in SPECIALS] == list(range(400, 407))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "made"))
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == list(range(400, 407))
    assert library.get_vocab_size() == len(theirs) == 447


def _changed(llama3: Path, folder: Path, **model: object) -> Path:
    shutil.copytree(llama3, folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def test_refused(base: Path, llama3: Path, english: list[str], japanese: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TokenizerError, match="is not byte-level"):
        extend_byte_level(base, japanese, 40, "ja", 1, out)
    with pytest.raises(TokenizerError, match="without dropout"):
        extend_byte_level(_changed(llama3, tmp_path / "dropout", dropout=0.1), japanese, 40, "ja", 1, out)
    vocab = json.loads((llama3 / "tokenizer.json").read_text())["model"]["vocab"]
    lacking = {piece: id for piece, id in vocab.items() if piece != written(b"\xe3")}
    with pytest.raises(TokenizerError, match="the first: 0xE3"):
        extend_byte_level(_changed(llama3, tmp_path / "lacking", vocab=lacking), japanese, 40, "ja", 1, out)
    with pytest.raises(TokenizerError, match="no piece is left"):
        extend_byte_level(llama3, english, 40, "ja", 1, out)
    with pytest.raises(TokenizerError, match="no piece is left"):
        extend_byte_level(llama3, japanese, 40, "ja", 1000, out)
    with pytest.raises(TokenizerError, match="is empty"):
        extend_byte_level(llama3, [], 40, "ja", 1, out)
    with pytest.raises(TokenizerError, match="unknown"):
        extend_byte_level(llama3, japanese, 40, "fr", 1, out)
    with pytest.raises(TokenizerError, match="at least 1"):
        extend_byte_level(llama3, japanese, 0, "ja", 1, out)
    assert not out.exists()


def test_a_special_token_that_is_a_word(llama3: Path, japanese: list[str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama3, base)
    made = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    made.add_special_tokens(["PADDING"])
    made.save(str(base / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="'PADDING' is one word"):
        extend_byte_level(base, japanese, 40, "ja", 1, tmp_path / "out")
