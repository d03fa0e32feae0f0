"""The vocabulary map: saved and read again, and refused when it means nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import Entry, Tokenizer, VocabMap, load_tokenizer, map_vocabularies


def test_saved_and_read(tmp_path: Path, extended: Path) -> None:
    vocab_map = VocabMap.load(extended)
    vocab_map.save(tmp_path / "copy.json")
    assert VocabMap.load(tmp_path / "copy.json") == vocab_map
    assert (tmp_path / "copy.json").read_bytes() == (extended / "vocab_map.json").read_bytes()


def test_identity(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    identity = VocabMap.identity(tokenizer)
    assert identity.old_size == identity.new_size == tokenizer.vocab_size
    assert identity.old_sha256 == identity.new_sha256 == tokenizer.sha256
    assert [entry.old_id for entry in identity.entries] == list(range(tokenizer.vocab_size))
    assert identity.counts()["new"] == 0
    from_json = VocabMap.identity(load_tokenizer(base / "tokenizer.json"))
    assert from_json.counts()["special"] == 3


@pytest.mark.parametrize(
    "entry",
    [
        Entry("kept", None),
        Entry("kept", 4),
        Entry("kept", -1),
        Entry("new", None, ()),
        Entry("new", None, (0, 4)),
        Entry("new", None, (True,)),
        Entry("special", None),
        Entry("padding", None, (0,)),
        Entry("other", 0),  # type: ignore[arg-type]
    ],
)
def test_entries_without_meaning(entry: Entry) -> None:
    with pytest.raises(TokenizerError, match="id 1"):
        VocabMap(4, 2, "a", "b", (Entry("kept", 0), entry))


@pytest.mark.parametrize("pair", [(2, 0), (-1, 0), (1, 4), (0, 1), (1, True)])
def test_pairs_without_meaning(pair: tuple[int, int]) -> None:
    entries = (Entry("kept", 0), Entry("new", None, (1, 2)))
    assert VocabMap(4, 2, "a", "b", entries, ((1, 0),)).nfkc_equal == ((1, 0),)
    with pytest.raises(TokenizerError, match="pair"):
        VocabMap(4, 2, "a", "b", entries, (pair,))


def test_a_vocabulary_onto_itself(base: Path, byte_level: Path) -> None:
    for path in (base, base / "tokenizer.json", byte_level):
        tokenizer = load_tokenizer(path)
        assert map_vocabularies(tokenizer, tokenizer) == VocabMap.identity(tokenizer)


def test_the_map_of_an_extension_is_found_again(base: Path, extended: Path) -> None:
    found = map_vocabularies(load_tokenizer(base), load_tokenizer(extended))
    assert found.entries == VocabMap.load(extended).entries


def _spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    return b"".join(tokenizer.piece_bytes(id) or b"?" for id in ids)


def test_across_families(base: Path, extended: Path, byte_level: Path, tmp_path: Path) -> None:
    """Every id comes from pieces that spell its bytes, whichever way its family writes them."""
    sentencepiece, from_json, bytelevel = map(load_tokenizer, (extended, extended / "tokenizer.json", byte_level))
    for old, new in ((sentencepiece, bytelevel), (bytelevel, sentencepiece), (sentencepiece, from_json)):
        found = map_vocabularies(old, new)
        ids = range(new.vocab_size)
        texts = {old.piece_bytes(id) for id in range(old.vocab_size)} - {None}
        for id, entry in zip(ids, found.entries, strict=True):
            data = new.piece_bytes(id)
            if data is not None:
                assert _spelled(old, entry.old_pieces if entry.old_id is None else [entry.old_id]) == data
                assert (entry.origin == "new") == (data not in texts)
        assert found.entries[new.bos_id or 0] == Entry("special", old.bos_id)
        assert found.entries[new.eos_id or 0] == Entry("special", old.eos_id)
        found.save(tmp_path / "map.json")
        assert VocabMap.load(tmp_path / "map.json") == found
    counts = map_vocabularies(sentencepiece, bytelevel).counts()
    assert counts["byte"] == 256
    assert counts["kept"] > 50  # " the" and the like
    # A byte that texts write is the letter, not the byte piece that no text gives.
    letter = map_vocabularies(sentencepiece, bytelevel).entries[bytelevel.encode("t")[0]].old_id
    assert letter is not None and sentencepiece.piece(letter) == "t"
    # A piece within the old family's pieces, found by another route.
    the = bytelevel.encode(" the")
    assert [map_vocabularies(sentencepiece, bytelevel).entries[id].old_id for id in the] == sentencepiece.encode("the")


def test_parts_of_characters_take_byte_pieces(base: Path, byte_level: Path) -> None:
    value = json.loads((byte_level / "tokenizer.json").read_text())
    value["model"]["vocab"] |= {"\u00e3\u0123": 400, "\u0124\u00e3": 401, "\u0120\u00e3\u0123\u0124": 402}
    value["model"]["merges"] = []
    (byte_level / "tokenizer.json").write_text(json.dumps(value))
    found = map_vocabularies(load_tokenizer(base), load_tokenizer(byte_level))
    assert found.entries[400].old_pieces == (3 + 0xE3, 3 + 0x81)
    assert found.entries[401].old_pieces == (3 + 0x82, 3 + 0xE3)
    space = load_tokenizer(base).encode_bytes(b" ")[0]
    assert found.entries[402].old_pieces == (space, 3 + 0xE3, 3 + 0x81, 3 + 0x82)


def test_specials_without_a_counterpart(base: Path, byte_level: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    made.add_special_tokens(["<|reserved|>"])
    made.save(str(byte_level / "tokenizer.json"))
    old, new = load_tokenizer(base), load_tokenizer(byte_level)
    entry = map_vocabularies(old, new).entries[400]
    assert entry == Entry("new", None, tuple(old.encode_bytes(b"<|reserved|>")))
    value = json.loads((byte_level / "tokenizer.json").read_text())
    value["model"]["vocab"] |= {"<|reserved|>": 400, "\u4e00": 402}
    (byte_level / "tokenizer.json").write_text(json.dumps(value))
    entries = map_vocabularies(old, load_tokenizer(byte_level)).entries
    assert entries[401:] == (Entry("padding", None), Entry("padding", None))


def test_equal_under_nfkc_is_named_not_merged(base: Path, byte_level: Path) -> None:
    """A full-width letter is not the letter: it is a new piece, and the pair is listed."""
    value = json.loads((byte_level / "tokenizer.json").read_text())
    value["model"]["vocab"]["\uff34".encode().decode("latin-1")] = 400  # these three bytes are written as themselves
    (byte_level / "tokenizer.json").write_text(json.dumps(value))
    old, new = load_tokenizer(base), load_tokenizer(byte_level)
    assert new.piece_bytes(400) == "\uff34".encode()
    found = map_vocabularies(old, new)
    capital = [id for id in range(old.vocab_size) if old.piece_bytes(id) == b"T"]
    assert found.entries[400].origin == "new"
    assert found.nfkc_equal == ((400, capital[-1]),)


def test_damaged_files(tmp_path: Path, extended: Path) -> None:
    whole: dict[str, Any] = json.loads((extended / "vocab_map.json").read_text())
    broken: list[Any] = [
        [],
        {**whole, "format": 2},
        {**whole, "entries": whole["entries"][:-1]},
        {**whole, "entries": [[1, 2], *whole["entries"][1:]]},
        {**whole, "entries": 5},
        {key: value for key, value in whole.items() if key != "old_sha256"},
    ]
    path = tmp_path / "vocab_map.json"
    for value in broken:
        path.write_text(json.dumps(value))
        with pytest.raises(TokenizerError):
            VocabMap.load(path)
    path.write_text((extended / "vocab_map.json").read_text()[:-100])
    with pytest.raises(TokenizerError, match="cut short"):
        VocabMap.load(path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xce")
    with pytest.raises(TokenizerError, match=r"is no vocabulary map: name the folder that `tokenizer extend`"):
        VocabMap.load(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="cannot read"):
        VocabMap.load(tmp_path / "missing.json")
