"""Reading tokenizers of both kinds, against the libraries that define them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import load_tokenizer


def test_bytes_of_pieces_spell_the_text(base: Path, byte_level: Path, english: list[str], japanese: list[str]) -> None:
    texts = [*english[:50], *japanese[:50], "tab\t nul\0 \r\n  run", "\U0001f468\u200d\U0001f469 \u00e9\U0010ffff"]
    for path in (base, base / "tokenizer.json", byte_level):
        tokenizer = load_tokenizer(path)
        space = "" if path == byte_level else " "  # SentencePiece puts one before a text
        for text in texts:
            pieces = [tokenizer.piece_bytes(id) for id in tokenizer.encode(text)]
            assert b"".join(piece or b"?" for piece in pieces) == (space + text).encode()


def test_kinds_of_ids(base: Path, byte_level: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    for path in (base, base / "tokenizer.json"):
        kinds = [load_tokenizer(path).kind(id) for id in range(reference.vocab_size())]
        assert kinds[:259] == ["special"] * 3 + ["byte"] * 256
        assert set(kinds[259:]) == {"text"}
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.kind(0) == tokenizer.kind(1) == "special"
    assert tokenizer.piece_bytes(0) is None
    singles = [id for id in range(400) if tokenizer.kind(id) == "byte"]
    assert sorted(tokenizer.piece_bytes(id) or b"" for id in singles) == [bytes([byte]) for byte in range(256)]


def test_added_tokens_and_holes(byte_level: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    made.add_special_tokens(["<|reserved|>"])
    made.add_tokens(["\u00e9t\u00e9"])
    value = json.loads(made.to_str())
    value["model"]["vocab"]["\u4e00"] = 402  # no byte is written so
    value["model"]["vocab"] |= {"<|reserved|>": 400, "\u00e9t\u00e9": 401, "ab cd": 404}
    (byte_level / "tokenizer.json").write_text(json.dumps(value))
    tokenizer = load_tokenizer(byte_level)
    assert [tokenizer.kind(id) for id in range(400, 405)] == ["special", "text", "unused", "unused", "unused"]
    assert [tokenizer.piece_bytes(id) for id in range(400, 404)] == [None, "\u00e9t\u00e9".encode(), None, None]
    assert tokenizer.encode("\u00e9t\u00e9") == [401]


def test_bytes_inside_a_text(base: Path, byte_level: Path, english: list[str]) -> None:
    for path in (base, base / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        for word in {word for line in english[:40] for word in line.split()}:
            assert tokenizer.encode_bytes(b" " + word.encode()) == tokenizer.encode(word)
            assert tokenizer.encode_bytes(b"\n" + word.encode()) == tokenizer.encode("\n" + word)[1:]
        assert tokenizer.encode_bytes(b"\x81\xe3") == [3 + 0x81, 3 + 0xE3]
        mixed = tokenizer.encode_bytes(b"\x81 river\xe3\x81")
        assert mixed == [3 + 0x81, *tokenizer.encode("river"), 3 + 0xE3, 3 + 0x81]
    tokenizer = load_tokenizer(byte_level)
    for data in (b" the river", b"\x81\xe3", "\x81\u3042 river".encode()[1:]):
        ids = tokenizer.encode_bytes(data)
        assert b"".join(tokenizer.piece_bytes(id) or b"?" for id in ids) == data
    assert tokenizer.encode_bytes(b" the river") == tokenizer.encode(" the river")


def test_sentencepiece_folder(base: Path, english: list[str]) -> None:
    tokenizer = load_tokenizer(base)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.path == base / "tokenizer.model"
    assert tokenizer.sha256 == sha256_file(base / "tokenizer.model")
    assert tokenizer.encode_batch(english) == reference.encode(english)
    assert tokenizer.encode_batch(english, num_threads=3) == reference.encode(english)
    assert [tokenizer.decode(tokenizer.encode(line)) for line in english] == english
    assert tokenizer.decode([1, *tokenizer.encode("the river"), 2]) == "the river"
    assert [tokenizer.piece(id) for id in range(300)] == [reference.id_to_piece(id) for id in range(300)]


def test_json_folder(byte_level: Path, english: list[str]) -> None:
    tokenizer = load_tokenizer(byte_level)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, None)
    assert tokenizer.vocab_size == 400
    long = " ".join(english[:20]) + " 静か\t🙂"
    assert len(tokenizer.encode(long)) > 4, "a truncation stored in the file must not cut texts"
    assert tokenizer.decode([0, *tokenizer.encode(long), 1]) == long
    assert tokenizer.encode_batch(english) == [tokenizer.encode(line) for line in english]


def test_spelled_specials_are_text(base: Path, byte_level: Path) -> None:
    for folder, text in ((base, "a</s>b"), (byte_level, "a<|end|>b")):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text


def test_what_is_read(base: Path, byte_level: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(base, both)
    shutil.copy(byte_level / "tokenizer.json", both / "tokenizer.json")
    assert load_tokenizer(both).path.name == "tokenizer.model"
    assert load_tokenizer(both / "tokenizer.json").vocab_size == 400
    shutil.copy(base / "tokenizer.model", tmp_path / "other.model")
    assert load_tokenizer(str(tmp_path / "other.model")).sha256 == load_tokenizer(base).sha256


@pytest.mark.parametrize("name", ["nothing", "empty", "notes.txt", "damaged.model", "damaged.json"])
def test_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "damaged.model").write_bytes(b"not a model")
    (tmp_path / "damaged.json").write_text('{"version"')
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(tmp_path / name)


def test_bad_texts_and_ids(base: Path, byte_level: Path) -> None:
    for folder in (base, byte_level):
        tokenizer = load_tokenizer(folder)
        with pytest.raises(TokenizerError, match="surrogate"):
            tokenizer.encode("a\ud800")
        for id in (-1, tokenizer.vocab_size):
            with pytest.raises(TokenizerError, match="expected 0 to"):
                tokenizer.decode([id])
            with pytest.raises(TokenizerError, match="expected 0 to"):
                tokenizer.piece(id)


def test_no_torch() -> None:
    code = "import sys, megatron_cpt.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
