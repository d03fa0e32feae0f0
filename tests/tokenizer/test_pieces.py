"""New, dead and shown pieces, of SentencePiece and byte-level vocabularies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_cpt.tokenizer import load_tokenizer, source_lines_changed
from megatron_cpt.tokenizer.model_file import ModelFile, Piece, PieceType, read_model_file
from megatron_cpt.tokenizer.pieces import cut, dead_ids, new_ids, read_pieces


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, english: list[str], japanese: list[str]) -> Path:
    """A byte-level BPE, as Llama 3's, of 600 ids."""
    folder = tmp_path_factory.mktemp("byte_level")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*english, *japanese], trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_new_pieces(base: Path, extended: Path, byte_level: Path) -> None:
    old, new = read_pieces(load_tokenizer(base)), read_pieces(load_tokenizer(extended))
    assert new_ids(old, new) == list(range(len(old.names), len(new.names)))
    assert new_ids(old, old) == [] == new_ids(new, old)
    other = read_pieces(load_tokenizer(byte_level))
    tokenizer = load_tokenizer(byte_level)
    every = {tokenizer.piece_bytes(id) for id in range(tokenizer.vocab_size)}
    known = {load_tokenizer(base).piece_bytes(id) for id in range(len(old.names))}
    assert {other.data[id] for id in new_ids(old, other)} == every - known and every & known


def test_byte_level_pieces_are_shown_as_text(byte_level: Path, base: Path, english: list[str]) -> None:
    pieces = read_pieces(load_tokenizer(byte_level))
    assert "".join(cut(pieces, ["静かな river".encode()])[0]) == "静かな\u2581river"
    assert cut(pieces, [b"\xe9\x9d"])[0][0].startswith("<E9>")
    assert pieces.is_byte[load_tokenizer(byte_level).encode_bytes(b"\xff")[0]]
    assert not pieces.is_line_end.any()
    changed = source_lines_changed(load_tokenizer(base), load_tokenizer(byte_level), ["the river", *english])
    assert changed["examples"][0]["new"][0] == "the"


def test_dead_pieces(
    base: Path, extended: Path, byte_level: Path, tmp_path: Path, rebuild: Callable[[ModelFile, Sequence[Piece]], bytes]
) -> None:
    assert dead_ids(read_pieces(load_tokenizer(base))) == []
    assert dead_ids(read_pieces(load_tokenizer(extended))) == []
    assert dead_ids(read_pieces(load_tokenizer(byte_level))) == []
    model = read_model_file(base / "tokenizer.model")
    # No two pieces join to the first one; the second lives between others only in its own text.
    added = [Piece("qzxjqzxj", -1e6, PieceType.NORMAL), Piece("\u2581th\u2581", -2e6, PieceType.NORMAL)]
    (tmp_path / "tokenizer.model").write_bytes(rebuild(model, [*model.pieces, *added]))
    pieces = read_pieces(load_tokenizer(tmp_path))
    first = len(model.pieces)
    assert dead_ids(pieces) == [first] == dead_ids(pieces, [first, first + 1])
    shutil.rmtree(tmp_path)
