"""The vocabulary map: saved and read again, and refused when it means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer


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
        Entry("other", 0),  # type: ignore[arg-type]
    ],
)
def test_entries_without_meaning(entry: Entry) -> None:
    with pytest.raises(TokenizerError, match="id 1"):
        VocabMap(4, 2, "a", "b", (Entry("kept", 0), entry))


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
    with pytest.raises(TokenizerError, match="cannot read"):
        VocabMap.load(tmp_path / "missing.json")
